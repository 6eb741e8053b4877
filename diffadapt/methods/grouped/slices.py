"""Expressions for a layer's slice of a larger factored matrix, made from the rows it touches alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffadapt.algebra.expression import Expression
from diffadapt.algebra.layer_maps import LayerMap


@dataclass(frozen=True)
class KronRows(Expression):
    """Some rows of a Kronecker product: row i is ``left[i] (b,)`` (x) ``right.matrix()[i] (d,)``."""

    left: Tensor
    right: Expression

    def matrix(self) -> Tensor:
        return (self.left[:, :, None] * self.right.matrix()[:, None, :]).flatten(1)

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        blocks = grad.unflatten(1, (self.left.shape[1], -1))
        grad_left = torch.einsum("ibd,id->ib", blocks, self.right.matrix())
        return grad_left, *self.right.vjp(torch.einsum("ibd,ib->id", blocks, self.left))


@dataclass(frozen=True)
class Slice(Expression):
    """A run of entries of a larger matrix, read row by row, as the matrix ``shape``.

    Attributes:
        rows: the larger matrix' rows that hold the run, possibly with more columns than it has.
        height, padded: the shape of ``rows``.
        columns: of the larger matrix; the rest of ``rows`` is surplus.
        start: where in its first row the run begins.
        shape: of the result.
    """

    rows: Expression
    height: int
    padded: int
    columns: int
    start: int
    shape: tuple[int, int]

    def matrix(self) -> Tensor:
        flat = self.rows.matrix()[:, : self.columns].reshape(-1)
        return flat[self.start : self.start + self.shape[0] * self.shape[1]].reshape(self.shape)

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        behind = self.height * self.columns - self.start - grad.numel()
        rows = F.pad(grad.reshape(-1), (self.start, behind)).reshape(self.height, self.columns)
        return self.rows.vjp(F.pad(rows, (0, self.padded - self.columns)))


@dataclass(frozen=True)
class Joined(Expression):
    """The entries of ``first``, then those of ``second``, read row by row as the matrix ``shape``.

    ``border`` counts the entries of ``first``. Where it falls between two rows and both are factored, each
    makes its share of the outputs.
    """

    first: Expression
    second: Expression
    border: int
    shape: tuple[int, int]

    def matrix(self) -> Tensor:
        entries = [part.matrix().reshape(-1) for part in (self.first, self.second)]
        return torch.cat(entries).reshape(self.shape)

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, second = grad.reshape(-1).tensor_split([self.border])
        first = first.reshape(part_shape(first.numel(), self.shape[1]))
        second = second.reshape(part_shape(second.numel(), self.shape[1]))
        return *self.first.vjp(first), *self.second.vjp(second)

    def apply(self, layer: LayerMap, x: Tensor, shape: Sequence[int]) -> Tensor | None:
        above, inside_a_row = divmod(self.border, self.shape[1])
        if inside_a_row or getattr(layer, "groups", 1) > 1:
            return None
        first = self.first.apply(layer, x, (above, *shape[1:]))
        second = None if first is None else self.second.apply(layer, x, (shape[0] - above, *shape[1:]))
        return None if second is None else torch.cat([first, second], layer.channel_dim)


def part_shape(length: int, columns: int) -> tuple[int, int]:
    """The matrix shape of a run of entries: whole rows where it holds such, else one row."""
    return (length // columns, columns) if length % columns == 0 else (1, length)


def join(parts: Sequence[Expression], lengths: Sequence[int], shape: tuple[int, int]) -> Expression:
    """Runs of entries, one behind the other, as one expression of the matrix ``shape``.

    Every part has the shape that ``part_shapes`` gives it.
    """
    if len(parts) == 1:
        return parts[0]
    rest = part_shape(sum(lengths[1:]), shape[1])
    return Joined(parts[0], join(parts[1:], lengths[1:], rest), lengths[0], shape)


def part_shapes(lengths: Sequence[int], columns: int) -> list[tuple[int, int]]:
    """The shape of every part of a matrix with so many ``columns`` that is cut into runs of entries."""
    shapes = []
    for index, length in enumerate(lengths):
        shapes.append(part_shape(length, columns))
        columns = part_shape(sum(lengths[index + 1 :]), columns)[1] if lengths[index + 1 :] else columns
    return shapes
