"""Checks of an export: its arguments, changes without a place in the file, and how programs read the file."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffadapt.adapters.adapter import Adapter
from diffadapt.common.messages import did_you_mean
from diffadapt.formats.export.exported_layer import ExportedLayer, exported_layers
from diffadapt.formats.export.report import ExportReport

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = ("kohya", "diffusers", "merged")


def check_arguments(to: str, dtype: str, rank: int | None) -> None:
    """Raises ValueError naming the first argument that is wrong."""
    if to not in KINDS:
        raise ValueError(f"cannot export to {to!r}{did_you_mean(to, KINDS)}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}{did_you_mean(dtype, DTYPES)}")
    if rank is None:
        return
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a whole number >= 1, got {rank!r}")
    if to != "diffusers":
        raise ValueError(f"rank is for diffusers alone: a {to} file holds every change exactly")


def checked_layers(adapter: Adapter, to: str, force: bool) -> list[ExportedLayer]:
    """The layers that an adapter changes.

    Raises:
        ValueError: no file of that kind can hold a change.
    """
    layers = exported_layers(adapter)
    _check_biases(layers, to, force)
    if to != "merged":
        _check_table_sizes(layers, to)
    return layers


def refuse_unless_good(report: ExportReport, force: bool) -> None:
    """Raises ValueError for a file that a program it is meant for does not read as it should."""
    if report.good or force:
        return
    for verdict in report.verdicts:
        if verdict.program in report.meant_for and not verdict.accepted:
            raise ValueError(
                f"{report.path} is not written: {verdict}; use --to merged, which holds every change, "
                "or --force"
            )


def _check_biases(layers: Sequence[ExportedLayer], to: str, force: bool) -> None:
    """A bias that stock layers have no place for: ComfyUI drops it, `from_pretrained` too."""
    if to == "diffusers" or (to == "kohya" and force):
        return
    gaining = [layer.name for layer in layers if layer.base_bias is None and layer.bias is not None]
    if gaining:
        raise ValueError(
            f"{len(gaining)} layers, e.g. {gaining[0]}, gain a bias that the stock layers do not have, so a "
            f"{to} file cannot hold it; --to diffusers can, unless norms change too. Else train without: "
            "difffit(beta=False), or targets that have biases"
        )


def _check_table_sizes(layers: Sequence[ExportedLayer], to: str) -> None:
    for layer in layers:
        if layer.num_new_rows:
            raise ValueError(
                f"{layer.name}: the class table has {layer.num_new_rows} rows more than the base's, which "
                f"a {to} file cannot hold; use --to merged"
            )
