"""Options common to methods with a rank, and checks of options."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from diffadapt.methods.base import Method

LARGEST_MULTIPLIER = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class RankedMethod(Method):
    """A method with a rank and a multiplier: `alpha` (multiplier = alpha / rank) or the constant `scale`."""

    rank: int = 4  # size of the factors
    alpha: float | None = None  # multiplier = alpha / rank; default alpha = rank
    scale: float | None = None  # multiplier itself, as papers state it
    dropout: float = 0.0  # share of the branch's inputs set to zero while training, in [0, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank("rank", self.rank)
        if self.alpha is not None and self.scale is not None:
            raise ValueError(f"{self.name}: give alpha={self.alpha} or scale={self.scale}, not both")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{self.name}: dropout must be in [0, 1), got {self.dropout}")
        check_multiplier(self.name, self.multiplier)

    @functools.cached_property  # every forward reads it
    def multiplier(self) -> float:
        """The factor `s` of the change: `scale`, or `alpha` over its divisor."""
        if self.scale is not None:
            return float(self.scale)
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / self.alpha_divisor()

    def alpha_divisor(self) -> float:
        """The number that `alpha` is divided by: the rank, unless a method says otherwise."""
        return self.rank


def check_rank(option: str, value: int) -> None:
    """Checks a rank.

    Raises:
        ValueError: `value` is not a whole number of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{option} must be a whole number >= 1, got {value!r}")


def check_multiplier(method: str, value: float) -> None:
    """Checks a multiplier.

    Raises:
        ValueError: float32 does not hold it.
    """
    if not abs(value) <= LARGEST_MULTIPLIER:
        raise ValueError(f"{method}: a multiplier of {value!r:.40} does not fit into float32; lower it")


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Checks an option that is one of a few words.

    Raises:
        ValueError: `value` is not one of `choices`.
    """
    if value not in choices:
        raise ValueError(f"{option} must be one of {', '.join(choices)}, got {value!r}")
