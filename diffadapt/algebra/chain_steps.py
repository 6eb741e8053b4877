"""The steps of a chain of thin maps: a layer's own map, the same on every run of channels, sums of runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffadapt.algebra.layer_maps import Grads, Wanted, added

if TYPE_CHECKING:
    from diffadapt.algebra.update import LayerMap


@dataclass(frozen=True)
class Shared:
    """The same map on every one of ``count`` equal runs of channels."""

    inner: LayerMap | Shared | Mix
    count: int

    @property
    def channel_dim(self) -> int:
        return self.inner.channel_dim

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._join(self.inner.product(self._split(x), weight))

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, wanted: Wanted, into: Tensor | None = None
    ) -> Grads:
        grad_x, grad_weight = self.inner.backward(self._split(grad), self._split(x), weight, wanted)
        return added(None if grad_x is None else self._join(grad_x), into), grad_weight

    def _split(self, x: Tensor) -> Tensor:
        if self.channel_dim == -1:
            return x.unflatten(-1, (self.count, x.shape[-1] // self.count))
        return x.reshape(x.shape[0] * self.count, x.shape[1] // self.count, *x.shape[2:])

    def _join(self, x: Tensor) -> Tensor:
        if self.channel_dim == -1:
            return x.flatten(-2)
        return x.reshape(x.shape[0] // self.count, self.count * x.shape[1], *x.shape[2:])


@dataclass(frozen=True)
class Mix:
    """``weight (a, b)`` between runs of channels: ``b`` equal runs become ``a``."""

    channel_dim: int

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[self.channel_dim] = shape[self.channel_dim] // weight.shape[1] * weight.shape[0]
        return (weight @ self._runs(x, weight.shape[1])).reshape(shape)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, wanted: Wanted, into: Tensor | None = None
    ) -> Grads:
        grad_x = grad_weight = None
        if wanted[1]:
            runs = self._runs(grad, weight.shape[0]), self._runs(x, weight.shape[1])
            grad_weight = torch.tensordot(*runs, ([0, 2], [0, 2]))
        if wanted[0]:
            grad_x = self.product(grad, weight.T)
        return added(grad_x, into), grad_weight

    def _runs(self, x: Tensor, count: int) -> Tensor:
        """``(n, count, length of a run)``."""
        rows = x.shape[0] if self.channel_dim == 1 else x.numel() // max(x.shape[-1], 1)
        return x.reshape(rows, count, x.numel() // max(rows * count, 1))


@dataclass(frozen=True)
class ChannelSum:
    """``share`` times the sum over the channels of each of ``groups`` runs, added in float32 or wider."""

    channel_dim: int
    groups: int = 1
    share: float = 1.0

    def product(self, x: Tensor, weight: None = None) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        if self.groups == 1:
            total = x.sum(self.channel_dim, keepdim=True, dtype=wide)
        else:
            total = x.unflatten(1, (self.groups, -1)).sum(2, dtype=wide)
        return (total if self.share == 1 else total * self.share).to(x.dtype)

    def backward(
        self, grad: Tensor, x: Tensor, weight: None, wanted: Wanted, into: Tensor | None = None
    ) -> Grads:
        if not wanted[0]:
            return None, None
        if self.share != 1:
            grad = grad * self.share
        if self.groups > 1:
            grad = grad.repeat_interleave(x.shape[1] // self.groups, 1)
        return (grad.expand(x.shape) if into is None else into.add_(grad)), None


@dataclass(frozen=True)
class Step:
    """One map of a chain with its weight; the weight of an untrained step is a constant."""

    map: LayerMap | Shared | Mix | ChannelSum
    weight: Tensor | None = None
    trained: bool = True

    def to(self, dtype: torch.dtype) -> Step:
        if self.weight is None or self.weight.dtype == dtype:
            return self
        return Step(self.map, self.weight.to(dtype), self.trained)
