"""Expressions of any rank: whole matrices, multiples and sums, entrywise and Kronecker products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.algebra.expression import ExportForm, Expression
from diffadapt.algebra.layer_maps import ChainStep, ChannelGroups, GroupMix, LayerMap
from diffadapt.algebra.low_rank import LowRank, at_most_full_rank, full_rank_factors

# singular values below this share of the largest are rounding: factors are trained in float32
RANK_TOLERANCE = 1e-7


@dataclass(frozen=True)
class Dense(ExportForm):
    """`delta = value`, any tensor of the weight's own shape or `(out, fan_in)`."""

    value: Tensor

    depends_on_base = False
    is_dense = True

    def matrix(self) -> Tensor:
        return self.value.reshape(self.value.shape[0], -1)

    def export_form(self, factor: float = 1.0) -> Dense:
        return Dense(factor * self.matrix())

    def rows_scaled(self, rows: Tensor) -> Dense:
        return Dense(rows[:, None] * self.matrix())

    def as_product(self) -> None:
        return None

    def vjp(self, grad: Tensor) -> tuple[Tensor]:
        return (grad.reshape(self.value.shape),)


@dataclass(frozen=True)
class Replacement(Expression):
    """`delta = table - weight`: a whole new `table` in the place of `weight`."""

    weight: Tensor
    table: Tensor

    def matrix(self) -> Tensor:
        return (self.table - self.weight).reshape(self.table.shape[0], -1)

    def export_form(self, factor: float = 1.0) -> Dense:
        return Dense(factor * self.matrix())

    def vjp(self, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad.reshape(self.table.shape)


@dataclass(frozen=True)
class Scaled(Expression):
    """`delta = factor * inner`."""

    inner: Expression
    factor: float

    @property
    def depends_on_base(self) -> bool:
        return self.inner.depends_on_base

    def matrix(self) -> Tensor:
        return self.factor * self.inner.matrix()

    def export_form(self, factor: float = 1.0) -> ExportForm:
        return self.inner.export_form(factor * self.factor)

    def added_to(self, weight: Tensor) -> Tensor:
        return torch.add(weight, self.inner.matrix(), alpha=self.factor)

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = []
        for inner_grad in self.inner.vjp(grad):
            grads.append(None if inner_grad is None else self.factor * inner_grad)
        return tuple(grads)


@dataclass(frozen=True)
class Sum(Expression):
    """`delta = first + second`."""

    first: Expression
    second: Expression

    @property
    def depends_on_base(self) -> bool:
        return self.first.depends_on_base or self.second.depends_on_base

    def matrix(self) -> Tensor:
        return self.first.matrix() + self.second.matrix()

    def export_form(self, factor: float = 1.0) -> ExportForm:
        return add_forms(self.first.export_form(factor), self.second.export_form(factor))

    def added_to(self, weight: Tensor) -> Tensor:
        return self.second.added_to(self.first.added_to(weight))

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *self.first.vjp(grad), *self.second.vjp(grad)


@dataclass(frozen=True)
class ReshapedLowRank(Expression):
    """A low-rank matrix of another shape, read row by row into `shape (out, fan_in)`."""

    inner: LowRank
    shape: tuple[int, int]

    depends_on_base = False

    def matrix(self) -> Tensor:
        return self.inner.matrix().reshape(self.shape)

    def export_form(self, factor: float = 1.0) -> ExportForm:
        # up (out * m, r) and down (r, n), read into (out, m * n): row o is made of the m products
        # up[o, j] down, so up becomes (out, m * r) and down is repeated m times on the diagonal
        out = self.shape[0]
        num_blocks, remainder = divmod(self.inner.up.shape[0], out)
        rank = num_blocks * self.inner.up.shape[1]
        if remainder or rank >= min(self.shape):
            return low_rank_or_dense(factor * self.matrix())
        up = factor * self.inner.up.reshape(out, -1)  # (out, m * r)
        return LowRank(up, torch.block_diag(*[self.inner.down] * num_blocks))

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        return self.inner.vjp(grad.reshape(self.inner.up.shape[0], -1))


@dataclass(frozen=True)
class RelativeChange(Expression):
    """`delta = weight * F`, or `weight * (exp(F) - 1)`, entry by entry, for the matrix `F` of `factor`."""

    weight: Tensor
    factor: Expression
    exponential: bool = False

    def matrix(self) -> Tensor:
        factor = self.factor.matrix()
        return self._weight_matrix(factor) * self._relative(factor)

    def export_form(self, factor: float = 1.0) -> Dense:
        return Dense(factor * self.matrix())

    def added_to(self, weight: Tensor) -> Tensor:
        factor = self.factor.matrix()
        return torch.addcmul(weight, self._weight_matrix(factor), self._relative(factor))

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        # d F = G * weight, or G * weight * exp(F)
        grad = grad * self._weight_matrix(grad)
        if self.exponential:
            grad = grad * self.factor.matrix().exp()
        return None, *self.factor.vjp(grad)

    def _relative(self, factor: Tensor) -> Tensor:
        return torch.expm1(factor) if self.exponential else factor

    def _weight_matrix(self, like: Tensor) -> Tensor:
        """The weight as a matrix `(out, fan_in)` in the precision of `like`."""
        return self.weight.reshape(self.weight.shape[0], -1).to(like.dtype)


@dataclass(frozen=True)
class ColumnScaled(Expression):
    """`delta = (weight + multiplier * inner) diag(columns) - weight`, with `columns (fan_in,)`."""

    weight: Tensor
    inner: Expression
    columns: Tensor
    multiplier: float

    def matrix(self) -> Tensor:
        return self._unscaled() * self.columns - self._weight_matrix()

    def export_form(self, factor: float = 1.0) -> Dense:
        return Dense(factor * self.matrix())

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        # for U = weight + multiplier * inner: d inner = multiplier G diag(columns), d columns = sum_o G * U
        inner_grads = self.inner.vjp(self.multiplier * grad * self.columns)
        return None, *inner_grads, (grad * self._unscaled()).sum(0)

    def _unscaled(self) -> Tensor:
        return self._weight_matrix() + self.multiplier * self.inner.matrix()

    def _weight_matrix(self) -> Tensor:
        return self.weight.flatten(1).to(self.columns.dtype)


@dataclass(frozen=True)
class EntrywiseProduct(Expression):
    """`delta = first * second`, entry by entry: of any two changes, as the Tucker products of LoHa files."""

    first: Expression
    second: Expression

    @property
    def depends_on_base(self) -> bool:
        return self.first.depends_on_base or self.second.depends_on_base

    def matrix(self) -> Tensor:
        return self.first.matrix() * self.second.matrix()

    def export_form(self, factor: float = 1.0) -> ExportForm:
        return low_rank_or_dense(factor * self.matrix())

    def added_to(self, weight: Tensor) -> Tensor:
        return torch.addcmul(weight, self.first.matrix(), self.second.matrix())

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        first_grads = self.first.vjp(grad * self.second.matrix())
        second_grads = self.second.vjp(grad * self.first.matrix())
        return *first_grads, *second_grads


@dataclass(frozen=True)
class LowRankHadamard(EntrywiseProduct, ExportForm):
    """`delta = (u1 @ v1) * (u2 @ v2)`, entry by entry (LoHa): of rank `r1 r2` at most.

    It equals the low-rank product over pairs of ranks `sum_pq (u1_p * u2_q) (v1_p * v2_q)^T`, where `u_p`
    is a column of `u` and `v_p` a row of `v` (face-splitting products).
    """

    first: LowRank
    second: LowRank

    def export_form(self, factor: float = 1.0) -> LowRankHadamard:
        return LowRankHadamard(self.first.export_form(factor), self.second)

    def rows_scaled(self, rows: Tensor) -> LowRankHadamard:
        return LowRankHadamard(self.first.rows_scaled(rows), self.second)

    def as_product(self) -> LowRank:
        return at_most_full_rank(self._over_pairs_of_ranks(), self)

    def is_thin(self, layer: LayerMap, shape: Sequence[int]) -> bool:
        fan_in = self.first.down.shape[1]
        rank = self.first.up.shape[1] * self.second.up.shape[1]
        is_smaller = layer.groups == 1 or rank * (layer.groups * fan_in + shape[0]) < shape[0] * fan_in
        # below a quarter of the shorter side r (out + fan_in) <= out fan_in / 2, half the layer's own product
        return is_smaller and 4 * rank < min(shape[0], fan_in)

    def steps(self, layer: LayerMap, shape: Sequence[int]) -> Sequence[ChainStep]:
        return self._over_pairs_of_ranks().steps(layer, shape)

    def steps_backward(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        # up[o, p, q] = u1[o, p] u2[o, q], down[p, q, i] = v1[p, i] v2[q, i]
        ranks = (self.first.up.shape[1], self.second.up.shape[1])
        down = grads[0].reshape(*ranks, -1)  # (r1, r2, fan_in)
        up = grads[1].reshape(-1, *ranks)  # (out, r1, r2)
        return (
            (up * self.second.up[:, None, :]).sum(2),
            (down * self.second.down[None, :, :]).sum(1),
            (up * self.first.up[:, :, None]).sum(1),
            (down * self.first.down[:, None, :]).sum(0),
        )

    def _over_pairs_of_ranks(self) -> LowRank:
        """The low-rank product over pairs of ranks."""
        up = (self.first.up[:, :, None] * self.second.up[:, None, :]).flatten(1)  # (out, r1 * r2)
        down = (self.first.down[:, None, :] * self.second.down[None, :, :]).flatten(0, 1)  # (r1 * r2, fan_in)
        return LowRank(up, down)


@dataclass(frozen=True)
class Kron(ExportForm):
    """The Kronecker product of `first (a, b)` and `second (c, d * kernel)`: `delta (a * c, b * d * kernel)`.

    Entry by entry `delta[(a, c), (b, m)] = first[a, b] second[c, m]`. Applied to `x`, the same `second` acts
    on every one of `b` runs of channels, and `first` mixes the results.
    """

    first: Tensor
    second: Expression

    def matrix(self) -> Tensor:
        second = self.second.matrix()
        product = torch.einsum("ab,cm->acbm", self.first, second)
        return product.reshape(self.first.shape[0] * second.shape[0], -1)

    @property
    def depends_on_base(self) -> bool:
        return self.second.depends_on_base

    def export_form(self, factor: float = 1.0) -> Kron:
        second = self.second.export_form()
        if not second.is_dense:
            second = second.as_product()
        return Kron(factor * self.first, second)

    def rows_scaled(self, rows: Tensor) -> LowRank:
        return self.as_product().rows_scaled(rows)

    def as_product(self) -> LowRank:
        # first (x) (up down) = (I (x) up) (first (x) down), or (first (x) up) (I (x) down): the smaller I
        second = self.second.export_form().as_product()
        if second is None:
            second = full_rank_factors(self.second.matrix())
        rows, columns = self.first.shape
        identity = torch.eye(min(rows, columns), dtype=self.first.dtype, device=self.first.device)
        if rows <= columns:
            product = LowRank(torch.kron(identity, second.up), torch.kron(self.first, second.down))
        else:
            product = LowRank(torch.kron(self.first, second.up), torch.kron(identity, second.down))
        return at_most_full_rank(product, self)

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        second = self.second.matrix()
        rows, columns = self.first.shape
        blocks = grad.reshape(rows, second.shape[0], columns, second.shape[1])  # (a, c, b, m)
        grad_first = torch.einsum("acbm,cm->ab", blocks, second)
        grad_second = torch.einsum("acbm,ab->cm", blocks, self.first)
        return grad_first, *self.second.vjp(grad_second)

    def is_thin(self, layer: LayerMap, shape: Sequence[int]) -> bool:
        return layer.groups == 1  # runs of channels would not be those of a layer's own groups

    def steps(self, layer: LayerMap, shape: Sequence[int]) -> Sequence[ChainStep]:
        # y_i = sum_j first[i, j] (second x_j) for the runs x_j of input channels: `second` on every run, then
        # `first` across the runs
        rows, columns = self.first.shape
        block = (shape[0] // rows, shape[1] // columns, *shape[2:])  # of second, as a weight of the layer
        if self.second.is_thin(layer, block):
            second_steps = self.second.steps(layer, block)
        else:
            second_steps = (ChainStep(layer, self.second.matrix().reshape(block)),)
        steps = []
        for step in second_steps:
            steps.append(ChainStep(ChannelGroups(step.map, columns), step.weight, step.trained))
        return *steps, ChainStep(GroupMix(layer.channel_dim), self.first)

    def steps_backward(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        *second_grads, first = grads
        if len(second_grads) > 1:
            return first, *self.second.steps_backward(second_grads)
        return first, *self.second.vjp(second_grads[0].flatten(1))


def low_rank_or_dense(matrix: Tensor) -> LowRank | Dense:
    """The factors of a matrix whose rank is so low that they are smaller than it; else the matrix itself.

    The rank is that of the singular values above `RANK_TOLERANCE` of the largest.
    """
    u, singular_values, vh = torch.linalg.svd(matrix, full_matrices=False)  # (out, n), (n,), (n, fan_in)
    rank = max(1, int((singular_values > RANK_TOLERANCE * singular_values[0]).sum()))
    if rank * sum(matrix.shape) >= matrix.numel():
        return Dense(matrix)
    # W = U S V^T: up = U S^1/2 and down = S^1/2 V^T, so that both factors are of one scale
    root = singular_values[:rank].sqrt()
    return LowRank(u[:, :rank] * root, root[:, None] * vh[:rank])


def add_forms(first: ExportForm, second: ExportForm) -> LowRank | Dense:
    """The sum of two forms: in factors where both have them and these are smaller, else dense."""
    first_product = first.as_product()
    second_product = second.as_product()
    if first_product is not None and second_product is not None:
        # up1 down1 + up2 down2 = [up1 up2] [down1; down2]
        up = torch.cat([first_product.up, second_product.up], 1)
        down = torch.cat([first_product.down, second_product.down], 0)
        if up.shape[1] < min(up.shape[0], down.shape[1]):
            return LowRank(up, down)
    return Dense(first.matrix() + second.matrix())
