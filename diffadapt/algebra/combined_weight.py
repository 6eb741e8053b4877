"""Several changes of one weight, added up: `W + sum_i t_i (W'_i - W)`, and the same for biases.

A new class table may have more rows than the base's (`class_table_expression`): the changed weight then has
those of the largest one, and `W` stands for the base with its new rows as they start.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffadapt.algebra.class_table_expression import NewClassTable, largest_class_table, pad_table
from diffadapt.algebra.expression import Update

HALF = (torch.bfloat16, torch.float16)
Weighted = Sequence[tuple[float, Update]]  # strengths and changes


def changed_weight(base: Tensor, updates: Weighted, *, resident: Tensor | None = None) -> Tensor:
    """`W + sum_i t_i (W'_i - W)` for the frozen weight `base`.

    Args:
        base: the frozen weight, in its own shape.
        updates: strengths `t_i` and changes.
        resident: what the changes are added to where the weight keeps its shape; the base by default.
    """
    largest_table = largest_class_table(base, updates)
    if largest_table is not None:
        start = largest_table.base_weight(base)
    else:
        start = base if resident is None else resident
    return _add_changes(start, base, updates, largest_table)


def weight_change(base: Tensor, updates: Weighted) -> Tensor:
    """`sum_i t_i (W'_i - W)`: differences are added up, so that no small one is rounded away beside `W`."""
    largest_table = largest_class_table(base, updates)
    zeros = base.new_zeros(changed_shape(base, updates))
    return _add_changes(zeros, base, updates, largest_table)


def start_weight(base: Tensor, updates: Weighted) -> Tensor:
    """`W`, what the changes are added to: the base, with the new rows of a class table as they start."""
    largest_table = largest_class_table(base, updates)
    return base if largest_table is None else largest_table.base_weight(base)


def changed_shape(base: Tensor, updates: Weighted) -> torch.Size:
    """The shape of the changed weight: the base's, but for a class table with more rows."""
    largest_table = largest_class_table(base, updates)
    if largest_table is None:
        return base.shape
    return torch.Size((largest_table.num_rows, *base.shape[1:]))


def _add_changes(
    total: Tensor, base: Tensor, updates: Weighted, largest_table: NewClassTable | None
) -> Tensor:
    """`total + sum_i t_i (W'_i - W)`, every change padded to the rows of the largest class table."""
    for strength, update in updates:
        if strength == 0:
            continue  # 0 times an infinite change would be NaN
        change = update.weight(base) - update.base_weight(base)
        if largest_table is not None:
            change = pad_table(change, largest_table.num_rows, null_class=largest_table.null_class)
        total = total + strength * change
    return total


def effective_bias(base: Tensor | None, resident: Tensor | None, updates: Weighted) -> Tensor | None:
    """`b + sum_i t_i (b'_i - b)`; None for a layer that has no bias and gets none.

    Args:
        base: the frozen bias `(out,)`; None where the layer has none.
        resident: what the changes are added to; None where the layer has no bias.
        updates: strengths `t_i` and changes.
    """
    total = resident
    for strength, update in updates:
        if not update.changes_bias() or (base is None and update.bias is None):
            continue
        trained = update.bias if update.bias is not None else update.bias_scale
        start = trained.new_zeros(trained.shape) if base is None else base.to(trained.dtype)  # (out,)
        change = strength * (update.bias_vector(start) - start)
        total = change if total is None else total + change
    return total


def to_compute_dtype(weight: Tensor) -> Tensor:
    """The weight in the precision adapters compute in: float32, or float64 for a float64 base."""
    return weight.float() if weight.dtype in HALF else weight
