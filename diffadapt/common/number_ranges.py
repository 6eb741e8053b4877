"""Checks of numeric command-line options."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping


def require_at_least(arguments: argparse.Namespace, minima: Mapping[str, float]) -> None:
    """Checks options against their smallest allowed values; options that were not given pass.

    Raises:
        ValueError: an option is too small or not finite; the message names it, its value and the minimum.
    """
    for name, minimum in minima.items():
        value = getattr(arguments, name)
        if value is not None and not (math.isfinite(value) and value >= minimum):
            raise ValueError(f"--{name} must be at least {minimum}, got {value}")


def require_seed(seed: int, option: str = "seed") -> None:
    """Checks that a seed is a signed integer of 64 bits, as adapter files store it.

    torch's generators would take larger ones too.

    Raises:
        ValueError: it is not; the message names the option, its value and the range.
    """
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"--{option} must be at least -2**63 and below 2**63, got {seed}")
