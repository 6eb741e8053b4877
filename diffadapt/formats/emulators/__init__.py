"""The programs that exported files are for: what each computes from a file, restated from its source.

Written apart from the writers on purpose: a mistake in one is seen by the other. Each module names the
version it restates. `apply` takes one layer and the file's tensors for it, without the layer's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn


class Refused(ValueError):
    """The program does not open the file; the reason is the message."""


@dataclass(frozen=True)
class Layer:
    """A layer of the program's own model.

    Attributes:
        name: of the layer in the file.
        kind: linear, conv, norm or embedding.
        weight, bias: its values, float64; no bias where it has none.
        module: the layer, for its geometry.
    """

    name: str
    kind: str
    weight: Tensor
    bias: Tensor | None
    module: nn.Module


@dataclass(frozen=True)
class Result:
    """What a program makes of one layer.

    Attributes:
        weight, bias: as the program has them then.
        ignored: keys it does not use.
        reason: why it does not use them, and what to do instead, where more is known than that.
    """

    weight: Tensor
    bias: Tensor | None
    ignored: frozenset[str] = frozenset()
    reason: str = ""


# from a layer and the file's tensors for it, by the rest of their keys
Apply = Callable[[Layer, Mapping[str, Tensor]], Result]


@dataclass(frozen=True)
class Program:
    """One program and its arithmetic."""

    name: str
    version: str
    apply: Apply


def unused(keys: Mapping[str, Tensor], read: set[str]) -> frozenset[str]:
    """The keys of a layer that a program ignores."""
    return frozenset(keys) - read


def with_bias(bias: Tensor | None, change: Tensor | None) -> Tensor | None:
    """A bias and its change, where either may be missing."""
    if change is None:
        return bias
    return change if bias is None else bias + change
