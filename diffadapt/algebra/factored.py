"""Expressions whose thin factors are small products of the trained tensors, made again in backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.algebra.chain_steps import Step
from diffadapt.algebra.update import Expression, LayerMap, LowRank, Tucker


class Derived(Expression):
    """Equal to a ``plain`` expression whose factors are small products of this one's tensors."""

    def plain(self) -> LowRank | Tucker:
        raise TypeError(f"{type(self).__name__} does not define plain()")

    def derive(self, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """Gradients of ``tensors()`` given those of the tensors of ``plain()``."""
        raise TypeError(f"{type(self).__name__} does not define derive()")

    def matrix(self) -> Tensor:
        return self.plain().matrix()

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        return self.derive(self.plain().vjp(grad))

    def is_thin(self, layer: LayerMap, shape: Sequence[int]) -> bool:
        return layer.groups == 1 or self.plain().is_thin(layer, shape)

    def steps(self, layer: LayerMap, shape: Sequence[int]) -> Sequence[Step]:
        return self.plain().steps(layer, shape)

    def steps_vjp(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        up, *core, down = reversed(grads)
        return self.derive((up.flatten(1), *core, down.flatten(1)))


@dataclass(frozen=True)
class Cored(Derived):
    """``up (out, r_out) @ core (r_out, r_in) @ down (r_in, fan_in)``; the core goes into the shorter side."""

    up: Tensor
    core: Tensor
    down: Tensor

    @property
    def _tall(self) -> bool:
        return self.up.shape[0] > self.down.shape[1]

    def plain(self) -> LowRank:
        if self._tall:
            return LowRank(self.up, self.core @ self.down)
        return LowRank(self.up @ self.core, self.down)

    def derive(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        up, down = grads
        if self._tall:
            return up, down @ self.down.T, self.core.T @ down
        return up @ self.core.T, self.up.T @ up, down


@dataclass(frozen=True)
class CoredTucker(Derived):
    """A Tucker product with the core ``core (r_out, r_in, *ranks)`` times one factor for each kernel axis.

    The factors ``kernel_0``, ... are ``(size, rank)`` each, as many as the convolution has dimensions.
    """

    up: Tensor
    core: Tensor
    down: Tensor
    kernel_0: Tensor
    kernel_1: Tensor | None = None
    kernel_2: Tensor | None = None

    keeps_steps = True  # the full core is small, and making it takes many operators

    def plain(self) -> Tucker:
        core = self._rows(self.core) @ self._whole(self._spread()).T
        sizes = [kernel.shape[0] for kernel in self._kernels]
        return Tucker(self.up, core.reshape(*self.core.shape[:2], *sizes), self.down)

    def derive(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
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
class ScaledFactors(Derived):
    """``diag(out_scale) up diag(rank_scale) down``."""

    up: Tensor
    down: Tensor
    out_scale: Tensor
    rank_scale: Tensor

    def plain(self) -> LowRank:
        return LowRank(self.out_scale[:, None] * self.up * self.rank_scale, self.down)

    def derive(self, grads: tuple[Tensor, ...]) -> tuple[None, None, Tensor, Tensor]:
        entries = grads[0] * self.up
        return None, None, entries @ self.rank_scale, self.out_scale @ entries


@dataclass(frozen=True)
class SinceStart(Derived):
    """``up @ down - start_up @ start_down`` as one product of rank 2 r.

    Written as ``(up - start_up) @ down + start_up @ (down - start_down)``: the differences are taken before
    any rounding to half precision, and the start is exactly zero.
    """

    up: Tensor
    down: Tensor
    start_up: Tensor
    start_down: Tensor

    def plain(self) -> LowRank:
        up = torch.cat([self.up - self.start_up, self.start_up], 1)
        return LowRank(up, torch.cat([self.down, self.down - self.start_down], 0))

    def derive(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, None, None]:
        rank = self.up.shape[1]
        return grads[0][:, :rank], grads[1][:rank] + grads[1][rank:], None, None
