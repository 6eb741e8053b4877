"""What an export refuses: wrong arguments, changes without a place in the file, a file that is read wrong."""

from __future__ import annotations

import torch

from diffadapt.adapters.adapter import Adapter
from diffadapt.common.messages import did_you_mean
from diffadapt.formats.export.exported_layer import ExportedLayer, exported_layers
from diffadapt.formats.export.report import ExportReport

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = ("kohya", "diffusers", "merged")


def check_arguments(to: str, dtype: str, rank: int | None) -> None:
    """Raises ValueError naming the first argument that will not do."""
    if to not in KINDS:
        raise ValueError(f"cannot export to {to!r}{did_you_mean(to, KINDS)}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}{did_you_mean(dtype, DTYPES)}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a whole number >= 1, got {rank!r}")
    if rank is not None and to != "diffusers":
        raise ValueError(f"rank is for diffusers alone: a {to} file holds every change exactly")


def checked_layers(adapter: Adapter, to: str, force: bool) -> list[ExportedLayer]:
    """What the adapter changes. Raises ValueError for what no file of that kind can hold."""
    changes = exported_layers(adapter)
    _check_biases(changes, to, force)
    _check_rows(changes, to)
    return changes


def refuse_unless_good(report: ExportReport, force: bool) -> None:
    """Raises ValueError for a file that a program it is meant for does not read as it should."""
    if report.good or force:
        return
    verdict = next(v for v in report.verdicts if v.program in report.meant_for and not v.accepted)
    raise ValueError(
        f"{report.path} is not written: {verdict}; use --to merged, which holds every change, or --force"
    )


def _check_biases(changes: list[ExportedLayer], to: str, force: bool) -> None:
    """A bias that stock layers have no place for: ComfyUI drops it, from_pretrained too."""
    gained = [change.name for change in changes if change.base_bias is None and change.bias is not None]
    if to != "diffusers" and gained and (to == "merged" or not force):
        raise ValueError(
            f"{len(gained)} layers, e.g. {gained[0]}, gain a bias that the stock layers do not have, so a "
            f"{to} file cannot hold it; --to diffusers can, unless norms change too. Else train without: "
            "difffit(beta=False), or targets that have biases"
        )


def _check_rows(changes: list[ExportedLayer], to: str) -> None:
    for change in changes if to != "merged" else ():
        if change.num_new_rows:
            raise ValueError(
                f"{change.name}: the class table has {change.num_new_rows} rows more than the base's, which "
                f"a {to} file cannot hold; use --to merged"
            )
