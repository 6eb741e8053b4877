"""Expressions of any rank: whole matrices, multiples and sums, entrywise and Kronecker products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.algebra.expression import Expression
from diffadapt.algebra.layer_maps import ChainStep, ChannelGroups, GroupMix, LayerMap
from diffadapt.algebra.low_rank import LowRank


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


@dataclass(frozen=True)
class Dense(Expression):
    """Any matrix ``value``, of the weight's own shape or ``(out, fan_in)``."""

    value: Tensor

    def matrix(self) -> Tensor:
        return self.value.reshape(self.value.shape[0], -1)

    def vjp(self, grad: Tensor) -> tuple[Tensor]:
        return (grad.reshape(self.value.shape),)


@dataclass(frozen=True)
class Replacement(Expression):
    """A whole new ``table`` in the place of ``weight``: their difference."""

    weight: Tensor
    table: Tensor

    def matrix(self) -> Tensor:
        return (self.table - self.weight).reshape(self.table.shape[0], -1)

    def vjp(self, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad.reshape(self.table.shape)


@dataclass(frozen=True)
class ReshapedLowRank(Expression):
    """A low-rank matrix of another shape, read row by row into ``shape (out, fan_in)``."""

    inner: LowRank
    shape: tuple[int, int]

    def matrix(self) -> Tensor:
        return self.inner.matrix().reshape(self.shape)

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        return self.inner.vjp(grad.reshape(self.inner.up.shape[0], -1))


@dataclass(frozen=True)
class RelativeChange(Expression):
    """``weight * factor``, or ``weight * (exp(factor) - 1)``: a change relative to each entry."""

    weight: Tensor
    factor: Expression
    exponential: bool = False

    def matrix(self) -> Tensor:
        factor = self.factor.matrix()
        return self._flat(factor) * (torch.expm1(factor) if self.exponential else factor)

    def added_to(self, weight: Tensor) -> Tensor:
        factor = self.factor.matrix()
        return torch.addcmul(weight, self._flat(factor), torch.expm1(factor) if self.exponential else factor)

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad * self._flat(grad)
        if self.exponential:
            grad = grad * self.factor.matrix().exp()
        return None, *self.factor.vjp(grad)

    def _flat(self, like: Tensor) -> Tensor:
        return self.weight.reshape(self.weight.shape[0], -1).to(like.dtype)


@dataclass(frozen=True)
class ColumnScaled(Expression):
    """``(weight + multiplier * inner) * columns - weight``: each column scaled by ``columns (fan_in,)``."""

    weight: Tensor
    inner: Expression
    columns: Tensor
    multiplier: float

    def matrix(self) -> Tensor:
        weight = self.weight.flatten(1).to(self.columns.dtype)
        return (weight + self.multiplier * self.inner.matrix()) * self.columns - weight

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        whole = self.weight.flatten(1).to(self.columns.dtype) + self.multiplier * self.inner.matrix()
        return None, *self.inner.vjp(self.multiplier * grad * self.columns), (grad * whole).sum(0)


@dataclass(frozen=True)
class EntrywiseProduct(Expression):
    """The entrywise product of any two changes, such as the Tucker products of LoHa files."""

    first: Expression
    second: Expression

    def matrix(self) -> Tensor:
        return self.first.matrix() * self.second.matrix()

    def added_to(self, weight: Tensor) -> Tensor:
        return torch.addcmul(weight, self.first.matrix(), self.second.matrix())

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *self.first.vjp(grad * self.second.matrix()), *self.second.vjp(grad * self.first.matrix())


@dataclass(frozen=True)
class LowRankHadamard(EntrywiseProduct):
    """The entrywise product of two low-rank matrices (LoHa)."""

    first: LowRank
    second: LowRank

    def is_thin(self, layer: LayerMap, shape: Sequence[int]) -> bool:
        (_, fan_in), rank = self.first.down.shape, self.first.up.shape[1] * self.second.up.shape[1]
        folded = layer.groups == 1 or rank * (layer.groups * fan_in + shape[0]) < shape[0] * fan_in
        return folded and 4 * rank < min(shape[0], fan_in)

    def steps(self, layer: LayerMap, shape: Sequence[int]) -> Sequence[ChainStep]:
        # rows of the Khatri-Rao product: (u1 v1) o (u2 v2) = (u1 o u2)(v1 o v2) over all pairs of ranks
        up = (self.first.up[:, :, None] * self.second.up[:, None, :]).flatten(1)
        down = (self.first.down[:, None, :] * self.second.down[None, :, :]).flatten(0, 1)
        return LowRank(up, down).steps(layer, shape)

    def steps_backward(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        ranks = self.first.up.shape[1], self.second.up.shape[1]
        up, down = grads[1].reshape(-1, *ranks), grads[0].reshape(*ranks, -1)
        return (
            (up * self.second.up[:, None, :]).sum(2),
            (down * self.second.down[None, :, :]).sum(1),
            (up * self.first.up[:, :, None]).sum(1),
            (down * self.first.down[:, None, :]).sum(0),
        )


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

    def is_thin(self, layer: LayerMap, shape: Sequence[int]) -> bool:
        return layer.groups == 1

    def steps(self, layer: LayerMap, shape: Sequence[int]) -> Sequence[ChainStep]:
        rows, columns = self.left.shape
        block = (shape[0] // rows, shape[1] // columns, *shape[2:])
        inner = (ChainStep(layer, self.right.matrix().reshape(block)),)
        if self.right.is_thin(layer, block):
            inner = self.right.steps(layer, block)
        shared = [ChainStep(ChannelGroups(step.map, columns), step.weight, step.trained) for step in inner]
        return *shared, ChainStep(GroupMix(layer.channel_dim), self.left)

    def steps_backward(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        *inner, left = grads
        if len(inner) > 1:
            return left, *self.right.steps_backward(inner)
        return left, *self.right.vjp(inner[0].flatten(1))
