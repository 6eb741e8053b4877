"""Expressions for a layer's slice of a larger factored matrix, made from the rows that it touches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffadapt.algebra.expression import ExportForm, Expression
from diffadapt.algebra.full_rank import low_rank_or_dense
from diffadapt.algebra.layer_maps import LayerMap


@dataclass(frozen=True)
class KronRows(Expression):
    """Some rows of a Kronecker product: row `i` is `first[i] (b,)` (x) `second.matrix()[i] (d,)`."""

    first: Tensor
    second: Expression

    @property
    def depends_on_base(self) -> bool:
        return self.second.depends_on_base

    def export_form(self, factor: float = 1.0) -> ExportForm:
        return low_rank_or_dense(factor * self.matrix())

    def matrix(self) -> Tensor:
        # M[i, (b, d)] = first[i, b] second[i, d]
        return (self.first[:, :, None] * self.second.matrix()[:, None, :]).flatten(1)  # (i, b d)

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        blocks = grad.unflatten(1, (self.first.shape[1], -1))  # (i, b, d)
        grad_first = torch.einsum("ibd,id->ib", blocks, self.second.matrix())
        grad_second = torch.einsum("ibd,ib->id", blocks, self.first)
        return grad_first, *self.second.vjp(grad_second)


@dataclass(frozen=True)
class Slice(Expression):
    """A run of entries of a larger matrix, read row by row, as the matrix `shape`.

    Attributes:
        rows: the rows of the larger matrix that hold the run, possibly with more columns than it has.
        height: the number of these rows.
        padded: their columns; those after `columns` are surplus.
        columns: columns of the larger matrix.
        start: where in its first row the run begins.
        shape: the shape of the result.
    """

    rows: Expression
    height: int
    padded: int
    columns: int
    start: int
    shape: tuple[int, int]

    @property
    def depends_on_base(self) -> bool:
        return self.rows.depends_on_base

    def export_form(self, factor: float = 1.0) -> ExportForm:
        return low_rank_or_dense(factor * self.matrix())

    def matrix(self) -> Tensor:
        entries = self.rows.matrix()[:, : self.columns].reshape(-1)  # (height columns,)
        length = self.shape[0] * self.shape[1]
        return entries[self.start : self.start + length].reshape(self.shape)

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        # the adjoint of cutting is padding with zeros: entries before and after the run, surplus columns
        entries_after = self.height * self.columns - self.start - grad.numel()
        grad_rows = F.pad(grad.reshape(-1), (self.start, entries_after)).reshape(self.height, self.columns)
        return self.rows.vjp(F.pad(grad_rows, (0, self.padded - self.columns)))


@dataclass(frozen=True)
class Joined(Expression):
    """The entries of `first`, then those of `second`, read row by row as the matrix `shape`.

    `border` is the number of entries of `first`. Where it falls between two rows and both are factored, each
    makes its share of the outputs.
    """

    first: Expression
    second: Expression
    border: int
    shape: tuple[int, int]

    @property
    def depends_on_base(self) -> bool:
        return self.first.depends_on_base or self.second.depends_on_base

    def export_form(self, factor: float = 1.0) -> ExportForm:
        return low_rank_or_dense(factor * self.matrix())

    def matrix(self) -> Tensor:
        entries_of_first = self.first.matrix().reshape(-1)  # (border,)
        entries_of_second = self.second.matrix().reshape(-1)
        return torch.cat([entries_of_first, entries_of_second]).reshape(self.shape)

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_first, grad_second = grad.reshape(-1).tensor_split([self.border])
        grad_first = grad_first.reshape(run_shape(grad_first.numel(), self.shape[1]))
        grad_second = grad_second.reshape(run_shape(grad_second.numel(), self.shape[1]))
        return *self.first.vjp(grad_first), *self.second.vjp(grad_second)

    def apply(self, layer: LayerMap, x: Tensor, shape: Sequence[int]) -> Tensor | None:
        rows_of_first, inside_a_row = divmod(self.border, self.shape[1])
        if inside_a_row or getattr(layer, "groups", 1) > 1:
            return None  # the halves would not be whole outputs that see the same inputs
        rows_of_second = shape[0] - rows_of_first
        y_first = self.first.apply(layer, x, (rows_of_first, *shape[1:]))
        if y_first is None:
            return None
        y_second = self.second.apply(layer, x, (rows_of_second, *shape[1:]))
        if y_second is None:
            return None
        return torch.cat([y_first, y_second], layer.channel_dim)


def run_shape(length: int, columns: int) -> tuple[int, int]:
    """The matrix shape of a run of entries: rows of `columns` entries where they divide it, else one row."""
    return (length // columns, columns) if length % columns == 0 else (1, length)


def run_shapes(lengths: Sequence[int], columns: int) -> list[tuple[int, int]]:
    """The shapes of all runs of entries that a matrix is cut into.

    Args:
        lengths: number of entries of every run, in order.
        columns: columns of the matrix.
    """
    shapes = []
    for index, length in enumerate(lengths):
        shapes.append(run_shape(length, columns))
        following = lengths[index + 1 :]
        if following:
            # `join_runs` joins what follows into a matrix of its own first
            columns = run_shape(sum(following), columns)[1]
    return shapes


def join_runs(runs: Sequence[Expression], lengths: Sequence[int], shape: tuple[int, int]) -> Expression:
    """Joins runs of entries, one behind the other, to the matrix `shape`.

    Args:
        runs: every run in the shape that `run_shapes` gives it.
        lengths: number of entries of every run.
        shape: the shape of the result.
    """
    if len(runs) == 1:
        return runs[0]
    following_shape = run_shape(sum(lengths[1:]), shape[1])
    following = join_runs(runs[1:], lengths[1:], following_shape)
    return Joined(runs[0], following, lengths[0], shape)
