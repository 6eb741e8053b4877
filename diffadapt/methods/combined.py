"""Several methods as one adapter in one file: every member changes the frozen base; the changes add up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffadapt.methods.base import Method


@dataclass(frozen=True)
class Combined(Method):
    """`a+b`: `W' = W + (a(W) - W) + (b(W) - W)`; the same for biases."""

    name: ClassVar[str] = "combined"

    members: tuple[Method, ...] = ()

    @property
    def learning_rate(self) -> float:
        # one rate for all members: the lowest is safe for each of them
        return min(member.learning_rate for member in self.members)

    @property
    def extra_targets(self) -> tuple[str, ...]:
        presets: list[str] = []
        for member in self.members:
            presets += member.extra_targets
        return tuple(presets)

    def __str__(self) -> str:
        return "+".join(str(member) for member in self.members)
