"""Intervals of metrics."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A 95 % interval and how it was found."""

    low: float
    high: float
    method: str
