"""The algebra of adapters: what a method changes in one layer, as an expression instead of a tensor.

    W' = scale * (W + multiplier * delta)        b' = bias_scale * (b + bias)

``W`` is the weight seen as a matrix ``(out, fan_in)``. From the expression ``delta`` follow, once for all
methods, the fast forward (``product``), the lean backward (``vjp``) and the exact merge (``matrix``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from diffadapt.convolution import ConvMap, LinearMap

LayerMap = LinearMap | ConvMap


class Expression:
    """A change of the weight matrix. Fields that are tensors or expressions are its factors, in order."""

    def matrix(self) -> Tensor:
        """The exact change ``(out, fan_in)`` in the factors' precision."""
        raise TypeError(f"{type(self).__name__} does not define matrix()")

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``tensors()`` given the gradient ``(out, fan_in)`` of ``matrix()``."""
        raise TypeError(f"{type(self).__name__} does not define vjp()")

    def product(self, layer: LayerMap, x: Tensor, shape: Sequence[int]) -> Tensor | None:
        """``layer(x)`` with the change as its weight of that ``shape``, through the factors; None where the
        expression is only a matrix, or where the matrix is cheaper."""
        return None

    def tensors(self) -> tuple[Tensor, ...]:
        """Every factor, depth first."""
        found: list[Tensor] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, Expression):
                found.extend(value.tensors())
        return tuple(found)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Expression:
        """The same expression over other factors, given in the order of ``tensors()``."""
        rest, changed = list(tensors), {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = rest.pop(0)
            elif isinstance(value, Expression):
                count = len(value.tensors())
                changed[field.name] = value.with_tensors(rest[:count])
                rest = rest[count:]
        return replace(self, **changed)


@dataclass(frozen=True)
class Update:
    """What one method does to one layer. Row vectors are ``(out,)``; all in the adapter's precision."""

    delta: Expression | None = None
    multiplier: float = 1.0
    scale: Tensor | None = None
    bias: Tensor | None = None
    bias_scale: Tensor | None = None

    def weight(self, base: Tensor) -> Tensor:
        """The exact ``W'`` for a base weight of any shape."""
        weight = base
        if self.delta is not None:
            weight = weight + self.multiplier * self.delta.matrix().reshape(base.shape)
        if self.scale is not None:
            weight = self.scale.reshape(-1, *(1,) * (base.dim() - 1)) * weight
        return weight

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

    def matrix(self) -> Tensor:
        return self.up @ self.down

    def vjp(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad @ self.down.T, self.up.T @ grad

    def product(self, layer: LayerMap, x: Tensor, shape: Sequence[int]) -> Tensor | None:
        up, down = self.up.to(x.dtype), self.down.to(x.dtype)
        if isinstance(layer, LinearMap):
            return layer.product(layer.product(x, down), up)
        kernels = down.reshape(-1, *shape[1:])  # (r, in/groups, *kernel)
        if layer.groups == 1:
            return layer.pointwise(layer.ungrouped(x, kernels), up)
        if layer.groups * down.numel() + up.numel() >= math.prod(shape):
            return None
        hidden = layer.ungrouped(fold_groups(x, layer.groups), kernels)
        return layer.pointwise(unfold_groups(hidden, layer.groups), up, layer.groups)


@dataclass(frozen=True)
class Tucker(Expression):
    """``core (r_out, r_in, *kernel)`` between ``up (out, r_out)`` and ``down (r_in, in/groups)``."""

    up: Tensor
    core: Tensor
    down: Tensor

    def matrix(self) -> Tensor:
        inner = torch.einsum("ab...,bi->ai...", self.core, self.down)
        return self.up @ inner.flatten(1)

    def vjp(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inner = torch.einsum("ab...,bi->ai...", self.core, self.down)
        grad_inner = (self.up.T @ grad).reshape(inner.shape)
        grad_core = torch.einsum("ai...,bi->ab...", grad_inner, self.down)
        grad_down = self.core.transpose(0, 1).flatten(1) @ grad_inner.movedim(1, -1).flatten(0, -2)
        return grad @ inner.flatten(1).T, grad_core, grad_down

    def product(self, layer: LayerMap, x: Tensor, shape: Sequence[int]) -> Tensor | None:
        up, core, down = (factor.to(x.dtype) for factor in (self.up, self.core, self.down))
        if layer.groups == 1:
            return layer.pointwise(layer.ungrouped(layer.pointwise(x, down), core), up)
        if layer.groups * (down.numel() + core.numel()) + up.numel() >= math.prod(shape):
            return None
        hidden = layer.ungrouped(layer.pointwise(fold_groups(x, layer.groups), down), core)
        return layer.pointwise(unfold_groups(hidden, layer.groups), up, layer.groups)


@dataclass(frozen=True)
class Scaled(Expression):
    """``factor`` times an inner expression."""

    inner: Expression
    factor: float

    def matrix(self) -> Tensor:
        return self.factor * self.inner.matrix()

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        return self.inner.vjp(self.factor * grad)


@dataclass(frozen=True)
class Sum(Expression):
    """``first + second``."""

    first: Expression
    second: Expression

    def matrix(self) -> Tensor:
        return self.first.matrix() + self.second.matrix()

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *self.first.vjp(grad), *self.second.vjp(grad)


def fold_groups(x: Tensor, groups: int) -> Tensor:
    return x.reshape(x.shape[0] * groups, x.shape[1] // groups, *x.shape[2:])


def unfold_groups(x: Tensor, groups: int) -> Tensor:
    return x.reshape(x.shape[0] // groups, groups * x.shape[1], *x.shape[2:])
