"""Several changes of one weight, added up: ``W + sum_i t_i (W'_i - W)``, and the same for biases."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffadapt.algebra.class_table_rows import NewRows, padded
from diffadapt.algebra.expression import Update

HALF = (torch.bfloat16, torch.float16)
Weighted = Sequence[tuple[float, Update]]  # strengths and changes


def changed_weight(base: Tensor, updates: Weighted, *, resident: Tensor | None = None) -> Tensor:
    """The changed weight for the frozen ``base``; of class tables that grow, with the rows of the largest.

    Args:
        resident: what the changes are added to where no table grows; the base by default.
    """
    updates = [(strength, update) for strength, update in updates if strength != 0]
    grown = largest_class_table(base, updates)
    if grown is None:
        total = base if resident is None else resident
        for strength, update in updates:
            total = total + strength * (update.weight(base) - base)
        return total
    total = grown.base_weight(base)
    for strength, update in updates:
        change = padded(
            update.weight(base) - update.base_weight(base), grown.rows, null_class=grown.null_class
        )
        total = total + strength * change
    return total


def start_weight(base: Tensor, updates: Weighted) -> Tensor:
    """What those changes are added to: the base, with the rows of the largest class table as they start."""
    grown = largest_class_table(base, updates)
    return base if grown is None else grown.base_weight(base)


def largest_class_table(base: Tensor, updates: Weighted) -> NewRows | None:
    """Of the changes that act, the class table with most rows; None where none has more than the base."""
    most, rows = None, len(base)
    for strength, update in updates:
        if strength != 0 and isinstance(update.delta, NewRows) and update.delta.rows > rows:
            most, rows = update.delta, update.delta.rows
    return most


def effective_bias(base: Tensor | None, resident: Tensor | None, updates: Weighted) -> Tensor | None:
    """``b + sum_i t_i (b'_i - b)`` over (strength, update); None for a layer that has none and gets none."""
    total = resident
    for strength, update in updates:
        if not update.changes_bias() or (base is None and update.bias is None):
            continue
        own = update.bias if update.bias is not None else update.bias_scale
        start = own.new_zeros(own.shape) if base is None else base.to(own.dtype)
        change = strength * (update.bias_vector(start) - start)
        total = change if total is None else total + change
    return total


def to_compute_dtype(weight: Tensor) -> Tensor:
    """The weight in the precision adapters compute in: float32, or float64 for a float64 base."""
    return weight.float() if weight.dtype in HALF else weight
