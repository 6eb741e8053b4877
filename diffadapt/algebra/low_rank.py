"""Low-rank expressions: products of thin factors, some of them made from smaller trained tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.algebra.expression import Expression
from diffadapt.algebra.layer_maps import ChainStep, ChannelGroups, ChannelSum, ConvMap, LayerMap, LinearMap


@dataclass(frozen=True)
class LowRank(Expression):
    """``up (out, r) @ down (r, fan_in)``."""

    up: Tensor
    down: Tensor

    saves_step_weights = True
    backward_needs_factors = False

    def matrix(self) -> Tensor:
        return self.up @ self.down

    def added_to(self, weight: Tensor) -> Tensor:
        return torch.addmm(weight, self.up, self.down)

    def vjp(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad @ self.down.T, self.up.T @ grad

    def is_thin(self, layer: LayerMap, shape: Sequence[int]) -> bool:
        return layer.groups == 1 or layer.groups * self.down.numel() + self.up.numel() < math.prod(shape)

    def steps(self, layer: LayerMap, shape: Sequence[int]) -> Sequence[ChainStep]:
        if isinstance(layer, LinearMap):
            return ChainStep(layer, self.down), ChainStep(layer, self.up)
        kernels = self.down.reshape(-1, *shape[1:])  # (r, in/groups, *kernel)
        first = layer if layer.groups == 1 else ChannelGroups(layer.whole(), layer.groups)
        return ChainStep(first, kernels), ChainStep(
            layer.pointwise(layer.groups), pointwise_weight(self.up, layer)
        )

    def steps_backward(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        return grads[1].flatten(1), grads[0].flatten(1)


@dataclass(frozen=True)
class Tucker(Expression):
    """``core (r_out, r_in, *kernel)`` between ``up (out, r_out)`` and ``down (r_in, in/groups)``."""

    up: Tensor
    core: Tensor
    down: Tensor

    saves_step_weights = True
    backward_needs_factors = False

    def matrix(self) -> Tensor:
        inner = torch.einsum("ab...,bi->ai...", self.core, self.down)
        return self.up @ inner.flatten(1)

    def vjp(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inner = torch.einsum("ab...,bi->ai...", self.core, self.down)
        grad_inner = (self.up.T @ grad).reshape(inner.shape)
        grad_core = torch.einsum("ai...,bi->ab...", grad_inner, self.down)
        grad_down = self.core.transpose(0, 1).flatten(1) @ grad_inner.movedim(1, -1).flatten(0, -2)
        return grad @ inner.flatten(1).T, grad_core, grad_down

    def is_thin(self, layer: LayerMap, shape: Sequence[int]) -> bool:
        inner = self.down.numel() + self.core.numel()
        return layer.groups == 1 or layer.groups * inner + self.up.numel() < math.prod(shape)

    def steps(self, layer: LayerMap, shape: Sequence[int]) -> Sequence[ChainStep]:
        if isinstance(layer, LinearMap):
            raise TypeError("a Tucker product needs a convolution; multiply the core into a low-rank factor")
        maps = layer.pointwise(), layer
        if layer.groups > 1:
            maps = ChannelGroups(maps[0], layer.groups), ChannelGroups(layer.whole(), layer.groups)
        first, last = pointwise_weight(self.down, layer), pointwise_weight(self.up, layer)
        return (
            ChainStep(maps[0], first),
            ChainStep(maps[1], self.core),
            ChainStep(layer.pointwise(layer.groups), last),
        )

    def steps_backward(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        return grads[2].flatten(1), grads[1], grads[0].flatten(1)


class Reparametrized(Expression):
    """Equal to a ``as_low_rank`` expression whose factors are small products of this one's tensors."""

    def as_low_rank(self) -> LowRank | Tucker:
        raise TypeError(f"{type(self).__name__} does not define plain()")

    def as_low_rank_vjp(self, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """Gradients of ``tensors()`` given those of the tensors of ``plain()``."""
        raise TypeError(f"{type(self).__name__} does not define derive()")

    def matrix(self) -> Tensor:
        return self.as_low_rank().matrix()

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        return self.as_low_rank_vjp(self.as_low_rank().vjp(grad))

    def is_thin(self, layer: LayerMap, shape: Sequence[int]) -> bool:
        return layer.groups == 1 or self.as_low_rank().is_thin(layer, shape)

    def steps(self, layer: LayerMap, shape: Sequence[int]) -> Sequence[ChainStep]:
        return self.as_low_rank().steps(layer, shape)

    def steps_backward(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        up, *core, down = reversed(grads)
        return self.as_low_rank_vjp((up.flatten(1), *core, down.flatten(1)))


@dataclass(frozen=True)
class LowRankWithCore(Reparametrized):
    """``up (out, r_out) @ core (r_out, r_in) @ down (r_in, fan_in)``; the core goes into the shorter side."""

    up: Tensor
    core: Tensor
    down: Tensor

    @property
    def _tall(self) -> bool:
        return self.up.shape[0] > self.down.shape[1]

    def as_low_rank(self) -> LowRank:
        if self._tall:
            return LowRank(self.up, self.core @ self.down)
        return LowRank(self.up @ self.core, self.down)

    def as_low_rank_vjp(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        up, down = grads
        if self._tall:
            return up, down @ self.down.T, self.core.T @ down
        return up @ self.core.T, self.up.T @ up, down


@dataclass(frozen=True)
class TuckerWithKernelFactors(Reparametrized):
    """A Tucker product with the core ``core (r_out, r_in, *ranks)`` times one factor for each kernel axis.

    The factors ``kernel_0``, ... are ``(size, rank)`` each, as many as the convolution has dimensions.
    """

    up: Tensor
    core: Tensor
    down: Tensor
    kernel_0: Tensor
    kernel_1: Tensor | None = None
    kernel_2: Tensor | None = None

    saves_step_weights = True  # the full core is small, and making it takes many operators

    def as_low_rank(self) -> Tucker:
        core = self._rows(self.core) @ self._whole(self._spread()).T
        sizes = [kernel.shape[0] for kernel in self._kernels]
        return Tucker(self.up, core.reshape(*self.core.shape[:2], *sizes), self.down)

    def as_low_rank_vjp(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        up, core, down = grads
        rows, spread = self._rows(core), self._spread()
        grad_core = (rows @ self._whole(spread)).reshape(self.core.shape)
        own = torch.mm(rows.T, self._rows(self.core))  # of the product of all axes
        sizes, ranks = zip(*[kernel.shape for kernel in self._kernels], strict=True)
        return up, grad_core, down, *_axes_vjp(own.reshape(*sizes, *ranks), spread)

    @property
    def _kernels(self) -> list[Tensor]:
        return [kernel for kernel in (self.kernel_0, self.kernel_1, self.kernel_2) if kernel is not None]

    def _rows(self, core: Tensor) -> Tensor:
        """A core with one row for each pair of channels."""
        return core.reshape(core.shape[0] * core.shape[1], -1)

    def _spread(self) -> list[Tensor]:
        """Every factor with its size and rank on its own axes of ``(*sizes, *ranks)``, 1 on the others."""
        dims = len(self._kernels)
        shapes = [[1] * 2 * dims for _ in range(dims)]
        for axis, kernel in enumerate(self._kernels):
            shapes[axis][axis], shapes[axis][dims + axis] = kernel.shape
        return [kernel.reshape(shape) for kernel, shape in zip(self._kernels, shapes, strict=True)]

    def _whole(self, spread: Sequence[Tensor]) -> Tensor:
        """The product of all axes ``(entries, ranks)``."""
        sizes = math.prod([kernel.shape[0] for kernel in self._kernels])
        return functools.reduce(torch.mul, spread).reshape(sizes, -1)


def _axes_vjp(grad: Tensor, spread: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the factors given that of their product ``(*sizes, *ranks)``."""
    dims, grads = len(spread), []
    for axis in range(dims):
        others = [factor for number, factor in enumerate(spread) if number != axis]
        summed = [dim for dim in range(2 * dims) if dim % dims != axis]
        own = functools.reduce(torch.mul, others, grad)
        grads.append(own.sum(summed) if summed else own)
    return grads


@dataclass(frozen=True)
class ScaledFactors(Reparametrized):
    """``diag(out_scale) up diag(rank_scale) down``."""

    up: Tensor
    down: Tensor
    out_scale: Tensor
    rank_scale: Tensor

    def as_low_rank(self) -> LowRank:
        return LowRank(self.out_scale[:, None] * self.up * self.rank_scale, self.down)

    def as_low_rank_vjp(self, grads: tuple[Tensor, ...]) -> tuple[None, None, Tensor, Tensor]:
        entries = grads[0] * self.up
        return None, None, entries @ self.rank_scale, self.out_scale @ entries


@dataclass(frozen=True)
class LowRankDifference(Reparametrized):
    """``up @ down - start_up @ start_down`` as one product of rank 2 r.

    Written as ``(up - start_up) @ down + start_up @ (down - start_down)``: the differences are taken before
    any rounding to half precision, and the start is exactly zero.
    """

    up: Tensor
    down: Tensor
    start_up: Tensor
    start_down: Tensor

    def as_low_rank(self) -> LowRank:
        up = torch.cat([self.up - self.start_up, self.start_up], 1)
        return LowRank(up, torch.cat([self.down, self.down - self.start_down], 0))

    def as_low_rank_vjp(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, None, None]:
        rank = self.up.shape[1]
        return grads[0][:, :rank], grads[1][:rank] + grads[1][rank:], None, None


@dataclass(frozen=True)
class FeatureSum(Expression):
    """The sum over an output's receptive field times ``vector (out,)``: keeps the sum, never ``x``.

    ``share``: what the steps multiply the sum by, and divide the vector by.
    """

    vector: Tensor
    fan_in: int
    share: float = 1.0

    def matrix(self) -> Tensor:
        return self.vector[:, None].expand(-1, self.fan_in)

    def vjp(self, grad: Tensor) -> tuple[Tensor]:
        return (grad.sum(1),)

    def is_thin(self, layer: LayerMap, shape: Sequence[int]) -> bool:
        return True

    def steps(self, layer: LayerMap, shape: Sequence[int]) -> Sequence[ChainStep]:
        groups, column = layer.groups, self.vector[:, None]
        if self.share != 1:
            column = column / self.share
        total = ChainStep(ChannelSum(layer.channel_dim, groups, self.share), trained=False)
        if isinstance(layer, LinearMap):
            return total, ChainStep(layer, column)
        window = ChainStep(layer, column.new_ones(groups, 1, *shape[2:]), trained=False)
        return total, window, ChainStep(layer.pointwise(groups), pointwise_weight(column, layer))

    def steps_backward(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        grad = grads[-1].reshape(self.vector.shape)
        return (grad if self.share == 1 else grad / self.share,)

    def for_dtype(self, dtype: torch.dtype) -> FeatureSum:
        """In float16 thousands of features would add up to more than 65,504, the largest number there."""
        if dtype != torch.float16:
            return self
        bits = math.ceil(math.log2(self.fan_in) / 2)  # half of what keeps any sum in range: vectors have one
        return FeatureSum(self.vector, self.fan_in, 2.0**-bits)


def pointwise_weight(matrix: Tensor, layer: ConvMap) -> Tensor:
    """A matrix as the weight of a 1x1 convolution."""
    return matrix.reshape(*matrix.shape, *(1,) * layer.dims)
