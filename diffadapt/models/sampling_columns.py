"""Looks: the ways of one sheet to set the strengths of its adapters, the same seeds under each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class AdapterFile:
    """One adapter to load, and how strong; None: what ``--strength`` says."""

    path: str
    strength: float | None


@dataclass(frozen=True)
class SamplingColumn:
    """A heading and the strength of every adapter."""

    name: str
    strengths: tuple[float, ...]


def parse_adapter_spec(text: str, *, strength: float | None = None) -> AdapterFile:
    """FILE or FILE:STRENGTH; a colon that is part of an existing path is left alone."""
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return AdapterFile(text, strength)
    try:
        return AdapterFile(head, float(tail))
    except ValueError:
        return AdapterFile(text, strength)


def parse_strengths(text: str) -> list[float]:
    """``1`` or ``0,0.5,1``. Raises ValueError for anything but finite numbers."""
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
    """Every column of the sheet: the base, then each strength, and each adapter alone when side by side.

    Raises: ValueError for several strengths that no adapter takes, since all have their own.
    """
    if len(strengths) > 1 and all(file.strength is not None for file in files):
        raise ValueError("every adapter has its own :STRENGTH, so several of --strength change nothing")
    alone = range(len(files)) if side_by_side else [None]
    looks = [SamplingColumn("base", (0.0,) * len(files))] if with_base else []
    for chosen in alone:
        moving = [file for i, file in enumerate(files) if chosen in (None, i) and file.strength is None]
        for strength in strengths if moving else strengths[:1]:
            own = tuple(
                (strength if file.strength is None else file.strength) if chosen in (None, i) else 0.0
                for i, file in enumerate(files)
            )
            looks.append(SamplingColumn(_heading(files, own, chosen), own))
    return looks


def _heading(files: Sequence[AdapterFile], own: Sequence[float], chosen: int | None) -> str:
    return " + ".join(
        f"{Path(file.path).stem} {strength:g}"
        for i, (file, strength) in enumerate(zip(files, own, strict=True))
        if chosen in (None, i)
    )
