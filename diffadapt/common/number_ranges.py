"""Ranges of numbers on a command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping


def require_at_least(arguments: argparse.Namespace, minima: Mapping[str, float]) -> None:
    """Checks options against the smallest value they may have; options that were not given pass.

    Raises: ValueError naming the first option out of its range, its value and the range.
    """
    for name, minimum in minima.items():
        value = getattr(arguments, name)
        if value is not None and not (math.isfinite(value) and value >= minimum):
            raise ValueError(f"--{name} must be at least {minimum}, got {value}")


def require_seed(seed: int, option: str = "seed") -> None:
    """Checks a seed: adapter files take signed numbers of 64 bits, and torch's generators the next ones too.

    Raises: ValueError naming the option, its value and the range.
    """
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"--{option} must be at least -2**63 and below 2**63, got {seed}")
