"""Types and ranges of the options of metrics, checked before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from diffadapt.common.messages import did_you_mean

MAX_SEED = 2**32 - 1  # of numpy's RandomState


@dataclass(frozen=True)
class OptionRule:
    """Type and range of one option.

    Attributes:
        low: smallest value.
        high: largest value.
        is_whole: whether it is an integer.
        is_optional: whether None is allowed too, with which the metric chooses.
    """

    low: float
    high: float = math.inf
    is_whole: bool = True
    is_optional: bool = False

    def __str__(self) -> str:
        words = "a whole number" if self.is_whole else "a number"
        if self.high == math.inf:
            words += f" of at least {self.low}"
        else:
            words += f" from {self.low} to {self.high}"
        if self.is_optional:
            words += ", or null"
        return words

    def allows(self, value: object) -> bool:
        """Whether a value has the type and lies in the range."""
        if value is None:
            return self.is_optional
        types = int if self.is_whole else int | float
        if not isinstance(value, types) or isinstance(value, bool):  # True is an int
            return False
        return self.low <= value <= self.high


RULES = {  # an option's name means the same in every metric
    "k": OptionRule(1),  # nearest neighbours
    "subsets": OptionRule(1),
    "size": OptionRule(2),  # images of a subset: one has no pairs
    "splits": OptionRule(1),
    "seed": OptionRule(0, MAX_SEED),
    "threshold": OptionRule(-1, 1, is_whole=False, is_optional=True),  # a cosine
}


def check_options(metric: str, options: Mapping[str, object], defaults: Mapping[str, object]) -> None:
    """Checks options of a metric.

    Args:
        metric: its key.
        options: name -> value.
        defaults: the options that it has.

    Raises:
        ValueError: the metric lacks an option, of which the nearest is named, or a value is out of its range.
    """
    for name, value in options.items():
        if name not in defaults:
            suggestion = did_you_mean(name, defaults) if defaults else "; it has none"
            raise ValueError(f"{metric} has no option {name!r}{suggestion}")
        if not RULES[name].allows(value):
            raise ValueError(f"{metric}.{name}={value!r}: expected {RULES[name]}")
