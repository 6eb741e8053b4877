"""What the options of metrics may be: type and range, checked before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from diffadapt.common.messages import did_you_mean

SEEDS = 2**32 - 1  # the largest seed of numpy's RandomState


@dataclass(frozen=True)
class OptionRule:
    """Type and range of one option.

    Attributes:
        low, high: smallest and largest value.
        is_whole: an integer.
        is_optional: None is allowed too: the metric chooses.
    """

    low: float
    high: float = math.inf
    is_whole: bool = True
    is_optional: bool = False

    def __str__(self) -> str:
        kind = "a whole number" if self.is_whole else "a number"
        bounds = f"from {self.low} to {self.high}"
        if self.high == math.inf:
            bounds = f"of at least {self.low}"
        return f"{kind} {bounds}" + (", or null" if self.is_optional else "")

    def allows(self, value: object) -> bool:
        if value is None:
            return self.is_optional
        types = int if self.is_whole else int | float
        return isinstance(value, types) and not isinstance(value, bool) and self.low <= value <= self.high


RULES = {  # an option's name means the same in every metric
    "k": OptionRule(1),  # nearest neighbours
    "subsets": OptionRule(1),
    "size": OptionRule(2),  # images of a subset: one has no pairs
    "splits": OptionRule(1),
    "seed": OptionRule(0, SEEDS),
    "threshold": OptionRule(-1, 1, is_whole=False, is_optional=True),  # a cosine
}


def check_options(metric: str, options: Mapping[str, object], defaults: Mapping[str, object]) -> None:
    """Raises: ValueError for an option the metric lacks, with the nearest, and a value out of its range."""
    for name, value in options.items():
        if name not in defaults:
            known = did_you_mean(name, defaults) if defaults else "; it has none"
            raise ValueError(f"{metric} has no option {name!r}{known}")
        if not RULES[name].allows(value):
            raise ValueError(f"{metric}.{name}={value!r}: expected {RULES[name]}")
