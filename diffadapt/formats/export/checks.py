"""Checks of an export: its arguments, biases without a place in the file, and how programs read the file."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffadapt.common.messages import did_you_mean
from diffadapt.formats.export.exported_layer import ExportedLayer
from diffadapt.formats.export.report import ExportReport

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_dtype(dtype: str) -> None:
    """Raises ValueError for a precision that no file is written in."""
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}{did_you_mean(dtype, DTYPES)}")


def check_rank(rank: int | None, target: str, targets_with_rank: Sequence[str]) -> None:
    """Raises ValueError for a rank that is no rank, or for a target that cuts nothing."""
    if rank is None:
        return
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a whole number >= 1, got {rank!r}")
    if target not in targets_with_rank:
        listed = " and ".join(targets_with_rank)
        raise ValueError(f"rank is for {listed} alone: a {target} file holds every change exactly")


def check_no_new_biases(layers: Sequence[ExportedLayer], target: str) -> None:
    """Raises ValueError for a bias that stock layers have no place for.

    ComfyUI drops it, `from_pretrained` too.
    """
    gaining = [layer.name for layer in layers if layer.base_bias is None and layer.bias is not None]
    if gaining:
        raise ValueError(
            f"{len(gaining)} layers, e.g. {gaining[0]}, gain a bias that the stock layers do not have, so a "
            f"{target} file cannot hold it; --to diffusers can, unless norms change too. Else train without: "
            "difffit(beta=False), or targets that have biases"
        )


def check_not_quantised(layers: Sequence[ExportedLayer]) -> None:
    """Raises ValueError for a quantised weight, which cannot hold a change."""
    for layer in layers:
        quantised = layer.layer_state.quantised
        if quantised is not None:
            raise ValueError(
                f"{layer.name} is quantised ({quantised.kind.name}), and a merged export writes whole "
                "weights; `diffadapt export FILE FOLDER --to merged` loads the base unquantised for that"
            )


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
