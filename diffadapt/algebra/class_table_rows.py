"""Class tables of another number of rows than the base's: how rows start, and where they stand.

The rows of classes come first. A row that means "no class" is the last one and stays the last one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.algebra.expression import Expression


@dataclass(frozen=True)
class NewRows(Expression):
    """The first rows of ``weight (K, dim)``, and its null row, replaced by those of ``table (n, dim)``.

    A longer table adds rows: the changed weight then has ``n`` of them. Rows of the base beyond a shorter
    table stay. ``null_class``: whether the last row of both means "no class".
    """

    weight: Tensor
    table: Tensor
    null_class: bool

    @property
    def classes(self) -> int:
        """Classes of the table, without the null row."""
        return len(self.table) - self.null_class

    @property
    def rows(self) -> int:
        """Rows of the changed weight."""
        return max(len(self.table), len(self.weight))

    def base_weight(self, weight: Tensor) -> Tensor:
        return resized(weight, self.rows, null_class=self.null_class)

    def matrix(self) -> Tensor:
        start = resized(self.weight.to(self.table.dtype), len(self.table), null_class=self.null_class)
        return padded(self.table - start, self.rows, null_class=self.null_class)

    def vjp(self, grad: Tensor) -> tuple[None, Tensor]:
        last = self.rows - self.null_class
        return None, torch.cat([grad[: self.classes], grad[last:]])


def resized(table: Tensor, rows: int, *, null_class: bool) -> Tensor:
    """A table ``(K, dim)`` with so many rows: its own first classes, then the mean of all its classes for
    each further one, and its null row last."""
    classes, last = table.tensor_split([len(table) - null_class])
    kept = classes[: rows - null_class]
    mean = (classes if len(classes) else last).double().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([kept, mean.expand(rows - null_class - len(kept), -1), last])


def padded(change: Tensor, rows: int, *, null_class: bool) -> Tensor:
    """A change of a table with zeros for the classes that it does not know."""
    classes, last = change.tensor_split([len(change) - null_class])
    return torch.cat([classes, change.new_zeros(rows - len(change), *change.shape[1:]), last])
