"""More expressions of the algebra: changes relative to the weight, Kronecker products, feature sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.convolution import LinearMap
from diffadapt.update import Expression, LayerMap, LowRank, fold_groups


@dataclass(frozen=True)
class Dense(Expression):
    """Any matrix ``value``, of the weight's own shape or ``(out, fan_in)``."""

    value: Tensor

    def matrix(self) -> Tensor:
        return self.value.reshape(self.value.shape[0], -1)

    def vjp(self, grad: Tensor) -> tuple[Tensor]:
        return (grad.reshape(self.value.shape),)


@dataclass(frozen=True)
class Replace(Expression):
    """A whole new ``table`` in the place of ``weight``: their difference."""

    weight: Tensor
    table: Tensor

    def matrix(self) -> Tensor:
        return (self.table - self.weight).reshape(self.table.shape[0], -1)

    def vjp(self, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad.reshape(self.table.shape)


@dataclass(frozen=True)
class Folded(Expression):
    """An inner matrix of another shape, read row by row into ``shape (out, fan_in)``."""

    inner: Expression
    shape: tuple[int, int]

    def matrix(self) -> Tensor:
        return self.inner.matrix().reshape(self.shape)

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        return self.inner.vjp(grad.reshape(self.inner.matrix().shape))


@dataclass(frozen=True)
class Hadamard(Expression):
    """``weight * factor``, or ``weight * (exp(factor) - 1)``: a change relative to each entry."""

    weight: Tensor
    factor: Expression
    exponential: bool = False

    def matrix(self) -> Tensor:
        factor = self.factor.matrix()
        return self._flat(factor) * (torch.expm1(factor) if self.exponential else factor)

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad * self._flat(grad)
        if self.exponential:
            grad = grad * self.factor.matrix().exp()
        return None, *self.factor.vjp(grad)

    def _flat(self, like: Tensor) -> Tensor:
        return self.weight.reshape(self.weight.shape[0], -1).to(like.dtype)


@dataclass(frozen=True)
class HadamardPair(Expression):
    """The entrywise product of two low-rank matrices (LoHa)."""

    first: LowRank
    second: LowRank

    def matrix(self) -> Tensor:
        return self.first.matrix() * self.second.matrix()

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *self.first.vjp(grad * self.second.matrix()), *self.second.vjp(grad * self.first.matrix())

    def product(self, layer: LayerMap, x: Tensor, shape: Sequence[int]) -> Tensor | None:
        rank = self.first.up.shape[1] * self.second.up.shape[1]
        if 4 * rank >= min(shape[0], self.first.down.shape[1]):
            return None
        # rows of the Khatri-Rao product: (u1 v1) o (u2 v2) = (u1 o u2)(v1 o v2) over all pairs of ranks
        up = (self.first.up[:, :, None] * self.second.up[:, None, :]).flatten(1)
        down = (self.first.down[:, None, :] * self.second.down[None, :, :]).flatten(0, 1)
        return LowRank(up, down).product(layer, x, shape)


@dataclass(frozen=True)
class Kron(Expression):
    """``left (a, b)`` Kronecker ``right (c, d * kernel)``: the change ``(a * c, b * d * kernel)``."""

    left: Tensor
    right: Expression

    def matrix(self) -> Tensor:
        right = self.right.matrix()
        return torch.einsum("ab,cm->acbm", self.left, right).reshape(self.left.shape[0] * right.shape[0], -1)

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        right, (rows, columns) = self.right.matrix(), self.left.shape
        blocks = grad.reshape(rows, right.shape[0], columns, right.shape[1])
        grad_left = torch.einsum("acbm,cm->ab", blocks, right)
        return grad_left, *self.right.vjp(torch.einsum("acbm,ab->cm", blocks, self.left))

    def product(self, layer: LayerMap, x: Tensor, shape: Sequence[int]) -> Tensor | None:
        (rows, columns), left = self.left.shape, self.left.to(x.dtype)
        block = (shape[0] // rows, shape[1] // columns, *shape[2:])
        if isinstance(layer, LinearMap):
            inner = self._inner(layer, x.unflatten(-1, (columns, -1)), block)  # (..., b, c)
            return (left @ inner).flatten(-2)
        if layer.groups > 1:
            return None
        inner = self._inner(layer, fold_groups(x, columns), block)  # (batch * b, c, *size)
        mixed = left @ inner.reshape(x.shape[0], columns, -1)
        return mixed.reshape(x.shape[0], shape[0], *inner.shape[2:])

    def _inner(self, layer: LayerMap, x: Tensor, block: Sequence[int]) -> Tensor:
        factored = self.right.product(layer, x, block)
        if factored is not None:
            return factored
        return layer.product(x, self.right.matrix().reshape(block).to(x.dtype))


@dataclass(frozen=True)
class FeatureSum(Expression):
    """The sum over an output's receptive field times ``vector (out,)``: keeps the sum, never ``x``."""

    vector: Tensor
    fan_in: int

    def matrix(self) -> Tensor:
        return self.vector[:, None].expand(-1, self.fan_in)

    def vjp(self, grad: Tensor) -> tuple[Tensor]:
        return (grad.sum(1),)

    def product(self, layer: LayerMap, x: Tensor, shape: Sequence[int]) -> Tensor:
        vector = self.vector.to(x.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        if isinstance(layer, LinearMap):
            return x.sum(-1, keepdim=True, dtype=wide).to(x.dtype) * vector
        groups = layer.groups
        total = x.unflatten(1, (groups, -1)).sum(2, dtype=wide).to(x.dtype)  # (batch, groups, *size)
        window = layer.product(total, total.new_ones(groups, 1, *shape[2:]))
        per_row = window.repeat_interleave(shape[0] // groups, 1) if groups > 1 else window
        return per_row * vector.reshape(-1, *(1,) * layer.dims)
