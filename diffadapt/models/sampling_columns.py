"""Columns of a sheet of samples: the same images under different strengths of the adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class AdapterFile:
    """One adapter to load.

    Attributes:
        path: of its file.
        strength: its strength; None for that of `--strength`.
    """

    path: str
    strength: float | None


@dataclass(frozen=True)
class SamplingColumn:
    """One column of the sheet.

    Attributes:
        name: the heading.
        strengths: one per adapter.
    """

    name: str
    strengths: tuple[float, ...]


def parse_adapter_spec(text: str, *, strength: float | None = None) -> AdapterFile:
    """Parses FILE or FILE:STRENGTH; a colon that is part of an existing path is left alone."""
    path, colon, ending = text.rpartition(":")
    if not colon or Path(text).exists():
        return AdapterFile(text, strength)
    try:
        return AdapterFile(path, float(ending))
    except ValueError:
        return AdapterFile(text, strength)


def parse_strengths(text: str) -> list[float]:
    """Parses `1` or `0,0.5,1`.

    Raises:
        ValueError: an item is no finite number.
    """
    try:
        strengths = [float(item) for item in str(text).split(",")]
    except ValueError:
        strengths = [math.nan]
    if not all(math.isfinite(strength) for strength in strengths):
        raise ValueError(f"--strength is a number or several with commas, such as 0,0.5,1, got {text!r}")
    return strengths


def make_columns(
    files: Sequence[AdapterFile], strengths: Sequence[float], *, side_by_side: bool, with_base: bool
) -> list[SamplingColumn]:
    """All columns of the sheet: the base, then each strength of all adapters together or of each alone.

    Args:
        files: the adapters, those with a strength of their own among them.
        strengths: for the adapters without one.
        side_by_side: each adapter alone.
        with_base: a column without adapters first.

    Raises:
        ValueError: there are several strengths, and no adapter takes them, since all have their own.
    """
    if len(strengths) > 1 and all(file.strength is not None for file in files):
        raise ValueError("every adapter has its own :STRENGTH, so several of --strength change nothing")
    columns = []
    if with_base:
        columns.append(SamplingColumn("base", (0.0,) * len(files)))
    everything = range(len(files))
    groups = [[index] for index in everything] if side_by_side else [list(everything)]
    for group in groups:
        is_variable = any(files[index].strength is None for index in group)
        for strength in strengths if is_variable else strengths[:1]:
            columns.append(_make_column(files, group, strength))
    return columns


def _make_column(files: Sequence[AdapterFile], group: Sequence[int], strength: float) -> SamplingColumn:
    """The column in which the adapters of a group are on, at `strength` where they have none of their own."""
    strengths = [0.0] * len(files)
    headings = []
    for index in group:
        file = files[index]
        strengths[index] = strength if file.strength is None else file.strength
        headings.append(f"{Path(file.path).stem} {strengths[index]:g}")
    return SamplingColumn(" + ".join(headings), tuple(strengths))
