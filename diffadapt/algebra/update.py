"""The algebra of adapters: what a method changes in one layer, as an expression instead of a tensor.

    W' = scale * (W + multiplier * delta)        b' = bias_scale * (b + bias)

``W`` is the weight seen as a matrix ``(out, fan_in)``. From the expression ``delta`` follow, once for all
methods, the fast forward (``product``), the lean backward (``vjp``) and the exact merge (``matrix``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.algebra.chain_steps import Shared, Step
from diffadapt.algebra.layer_maps import ConvMap, LinearMap

LayerMap = LinearMap | ConvMap


class Expression:
    """A change of the weight matrix. Fields that are tensors or expressions are its factors, in order.

    ``keeps_steps``: whether backward keeps the weights of ``steps``, which are views of the factors or small.
    """

    keeps_steps = False
    steps_suffice = False  # whether ``steps_vjp`` needs the gradients alone, not the factors

    def matrix(self) -> Tensor:
        """The exact change ``(out, fan_in)`` in the factors' precision."""
        raise TypeError(f"{type(self).__name__} does not define matrix()")

    def origin(self, weight: Tensor) -> Tensor:
        """What the change is added to: the weight, but for tables that grow."""
        return weight

    def added_to(self, weight: Tensor) -> Tensor:
        """``weight (out, fan_in)`` plus the change, in as few passes over it as there are."""
        return weight + self.matrix()

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``tensors()`` given the gradient ``(out, fan_in)`` of ``matrix()``."""
        raise TypeError(f"{type(self).__name__} does not define vjp()")

    def is_thin(self, layer: LayerMap, shape: Sequence[int]) -> bool:
        """Whether the change, as a layer's weight of that ``shape``, is a chain of maps cheaper than it."""
        return False

    def steps(self, layer: LayerMap, shape: Sequence[int]) -> Sequence[Step]:
        """That chain: at least two maps, the last thin on its input."""
        raise TypeError(f"{type(self).__name__} does not define steps()")

    def steps_vjp(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Gradients of ``tensors()`` given those of the weights of ``steps``."""
        raise TypeError(f"{type(self).__name__} does not define steps_vjp()")

    def within(self, dtype: torch.dtype) -> Expression:
        """The same change, with steps whose values stay in the range of activations in that precision."""
        return self

    def product(self, layer: LayerMap, x: Tensor, shape: Sequence[int]) -> Tensor | None:
        """``layer(x)`` with the change alone as its weight, through its chain; None where it has none."""
        if not self.is_thin(layer, shape):
            return None
        for step in self.steps(layer, shape):
            x = step.map.product(x, step.to(x.dtype).weight)
        return x

    def tensors(self) -> tuple[Tensor, ...]:
        """Every factor, depth first."""
        found: list[Tensor] = []
        for name in self.__match_args__:  # the dataclass' fields
            value = getattr(self, name)
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, Expression):
                found.extend(value.tensors())
        return tuple(found)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Expression:
        """The same expression over other factors, given in the order of ``tensors()``."""
        rest, values = list(tensors), []
        for name in self.__match_args__:  # the dataclass' fields
            value = getattr(self, name)
            if isinstance(value, Tensor):
                value = rest.pop(0)
            elif isinstance(value, Expression):
                count = len(value.tensors())
                value, rest = value.with_tensors(rest[:count]), rest[count:]
            values.append(value)
        return type(self)(*values)


@dataclass(frozen=True)
class Update:
    """What one method does to one layer. Row vectors are ``(out,)``; all in the adapter's precision.

    ``recompute``: make the unscaled product again in backward, where ``scale`` needs it; do not keep it.
    """

    delta: Expression | None = None
    multiplier: float = 1.0
    scale: Tensor | None = None
    bias: Tensor | None = None
    bias_scale: Tensor | None = None
    recompute: bool = False

    def weight(self, base: Tensor) -> Tensor:
        """The exact ``W'`` for a base weight of any shape; it has the shape of ``origin``."""
        weight = self.origin(base)
        if self.delta is not None:
            weight = weight + self.multiplier * self.delta.matrix().reshape(weight.shape)
        if self.scale is not None:
            weight = self.scale.reshape(-1, *(1,) * (base.dim() - 1)) * weight
        return weight

    def origin(self, base: Tensor) -> Tensor:
        """The weight without the change: the base, with the new rows of a table as they start."""
        return base if self.delta is None else self.delta.origin(base)

    def changes_bias(self) -> bool:
        return self.bias is not None or self.bias_scale is not None

    def bias_vector(self, base: Tensor) -> Tensor:
        """The exact ``b'``; a layer without a bias passes zeros."""
        vector = base if self.bias is None else base + self.bias
        return vector if self.bias_scale is None else self.bias_scale * vector


@dataclass(frozen=True)
class LowRank(Expression):
    """``up (out, r) @ down (r, fan_in)``."""

    up: Tensor
    down: Tensor

    keeps_steps = steps_suffice = True

    def matrix(self) -> Tensor:
        return self.up @ self.down

    def added_to(self, weight: Tensor) -> Tensor:
        return torch.addmm(weight, self.up, self.down)

    def vjp(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad @ self.down.T, self.up.T @ grad

    def is_thin(self, layer: LayerMap, shape: Sequence[int]) -> bool:
        return layer.groups == 1 or layer.groups * self.down.numel() + self.up.numel() < math.prod(shape)

    def steps(self, layer: LayerMap, shape: Sequence[int]) -> Sequence[Step]:
        if isinstance(layer, LinearMap):
            return Step(layer, self.down), Step(layer, self.up)
        kernels = self.down.reshape(-1, *shape[1:])  # (r, in/groups, *kernel)
        first = layer if layer.groups == 1 else Shared(layer.whole(), layer.groups)
        return Step(first, kernels), Step(layer.pointwise(layer.groups), pointwise_weight(self.up, layer))

    def steps_vjp(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        return grads[1].flatten(1), grads[0].flatten(1)


@dataclass(frozen=True)
class Tucker(Expression):
    """``core (r_out, r_in, *kernel)`` between ``up (out, r_out)`` and ``down (r_in, in/groups)``."""

    up: Tensor
    core: Tensor
    down: Tensor

    keeps_steps = steps_suffice = True

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

    def steps(self, layer: LayerMap, shape: Sequence[int]) -> Sequence[Step]:
        if isinstance(layer, LinearMap):
            raise TypeError("a Tucker product needs a convolution; multiply the core into a low-rank factor")
        maps = layer.pointwise(), layer
        if layer.groups > 1:
            maps = Shared(maps[0], layer.groups), Shared(layer.whole(), layer.groups)
        first, last = pointwise_weight(self.down, layer), pointwise_weight(self.up, layer)
        return Step(maps[0], first), Step(maps[1], self.core), Step(layer.pointwise(layer.groups), last)

    def steps_vjp(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        return grads[2].flatten(1), grads[1], grads[0].flatten(1)


@dataclass(frozen=True)
class Scaled(Expression):
    """``factor`` times an inner expression."""

    inner: Expression
    factor: float

    def matrix(self) -> Tensor:
        return self.factor * self.inner.matrix()

    def added_to(self, weight: Tensor) -> Tensor:
        return torch.add(weight, self.inner.matrix(), alpha=self.factor)

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(None if own is None else self.factor * own for own in self.inner.vjp(grad))


@dataclass(frozen=True)
class Sum(Expression):
    """``first + second``."""

    first: Expression
    second: Expression

    def matrix(self) -> Tensor:
        return self.first.matrix() + self.second.matrix()

    def added_to(self, weight: Tensor) -> Tensor:
        return self.second.added_to(self.first.added_to(weight))

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *self.first.vjp(grad), *self.second.vjp(grad)


def pointwise_weight(matrix: Tensor, layer: ConvMap) -> Tensor:
    """A matrix as the weight of a 1x1 convolution."""
    return matrix.reshape(*matrix.shape, *(1,) * layer.dims)
