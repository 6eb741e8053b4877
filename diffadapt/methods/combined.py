"""Several methods as one adapter in one file: every part changes the frozen base, and the changes add up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffadapt.methods.base import Method


@dataclass(frozen=True)
class Combined(Method):
    """``a+b``: ``W' = W + (a(W) - W) + (b(W) - W)``; the same for biases."""

    name: ClassVar[str] = "combined"

    members: tuple[Method, ...] = ()

    @property
    def learning_rate(self) -> float:
        return min(part.learning_rate for part in self.members)

    @property
    def extra_targets(self) -> tuple[str, ...]:
        return tuple(preset for part in self.members for preset in part.extra_targets)

    def __str__(self) -> str:
        return "+".join(str(part) for part in self.members)
