"""Class tables of another number of rows than the base's: how rows start, and where they stand.

The rows of classes come first. A row that means "no class" (the null class) is the last one and stays the
last one. All that is particular about such tables is here: `combined_weight` asks these functions, and every
other module asks `combined_weight`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.algebra.expression import Expression, Update
from diffadapt.algebra.full_rank import Dense


@dataclass(frozen=True)
class NewClassTable(Expression):
    """The first rows of `weight (K, dim)`, and its null row, replaced by those of `table (n, dim)`.

    A longer table adds rows: the changed weight then has n of them. Rows of the base beyond a shorter table
    stay.

    Attributes:
        weight: the frozen class table of the base.
        table: the trained table.
        null_class: whether the last row of both means "no class".
    """

    weight: Tensor
    table: Tensor
    null_class: bool

    @property
    def num_classes(self) -> int:
        """Classes of the table, without the null row."""
        return len(self.table) - self.null_class

    @property
    def num_rows(self) -> int:
        """Rows of the changed weight."""
        return max(len(self.table), len(self.weight))

    def base_weight(self, weight: Tensor) -> Tensor:
        return resize_table(weight, self.num_rows, null_class=self.null_class)

    def matrix(self) -> Tensor:
        start = resize_table(self.weight.to(self.table.dtype), len(self.table), null_class=self.null_class)
        return pad_table(self.table - start, self.num_rows, null_class=self.null_class)

    def export_form(self, factor: float = 1.0) -> Dense:
        return Dense(factor * self.matrix())

    def vjp(self, grad: Tensor) -> tuple[None, Tensor]:
        null_row = self.num_rows - self.null_class
        return None, torch.cat([grad[: self.num_classes], grad[null_row:]])


def resize_table(table: Tensor, num_rows: int, *, null_class: bool) -> Tensor:
    """A table `(K, dim)` with another number of rows.

    Returns:
        The table's own first classes, then the mean of all its classes for each further one, and its null row
        last: `(num_rows, dim)`.
    """
    classes, null_row = table.tensor_split([len(table) - null_class])
    old_classes = classes[: num_rows - null_class]
    averaged = classes if len(classes) else null_row
    mean = averaged.double().mean(0, keepdim=True).to(table.dtype)  # (1, dim)
    new_classes = mean.expand(num_rows - null_class - len(old_classes), -1)
    return torch.cat([old_classes, new_classes, null_row])


def pad_table(change: Tensor, num_rows: int, *, null_class: bool) -> Tensor:
    """A change `(n, dim)` of a table with zeros for the classes that it does not have: `(num_rows, dim)`."""
    classes, null_row = change.tensor_split([len(change) - null_class])
    zeros = change.new_zeros(num_rows - len(change), *change.shape[1:])
    return torch.cat([classes, zeros, null_row])


def largest_class_table(base: Tensor, updates: Sequence[tuple[float, Update]]) -> NewClassTable | None:
    """The class table with most rows among the changes that act; None where none has more than the base.

    Args:
        base: the frozen weight.
        updates: strengths and changes; those of strength zero do not act.
    """
    largest = None
    num_rows = len(base)
    for table in new_class_tables(updates):
        if table.num_rows > num_rows:
            largest = table
            num_rows = table.num_rows
    return largest


def new_class_tables(updates: Sequence[tuple[float, Update]]) -> list[NewClassTable]:
    """The class tables among the changes that act."""
    tables = []
    for strength, update in updates:
        if strength != 0 and isinstance(update.delta, NewClassTable):
            tables.append(update.delta)
    return tables
