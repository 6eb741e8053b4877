"""Changes of weights that hold several layers of diffusers, as changes of these layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffadapt.adapters.architectures import OriginalLayer
from diffadapt.formats.foreign.stored_change import StoredChange

LayerPath = tuple[str, str]  # component, and path in its model

# form -> tensors with one row for each output, whose rows are those of the change; LoKr's are products
_BY_OUTPUT = {
    "lora": ("up",),
    "tucker": ("up",),
    "loha": ("up_1", "up_2"),
    "dense": ("weight",),
    "bias": (),
}
_BESIDE = ("bias", "magnitude", "base_magnitude")


class LayerRows(NamedTuple):
    """A layer, its place in the original code, and the number of its rows."""

    layer: LayerPath
    place: OriginalLayer
    num_rows: int


def split_change(
    name: str, change: StoredChange, parts: Sequence[LayerRows]
) -> dict[LayerPath, StoredChange]:
    """The change of each layer from that of the original weight that holds their rows.

    Rows of a product `up @ down` are rows of `up`; LoHa's `(a1 b1) * (a2 b2)` likewise.

    Args:
        name: of the original weight in the file.
        change: of all its rows.
        parts: the layers that it holds.

    Raises:
        ValueError: the change has another number of rows, or is of a form that cannot be split there.
    """
    total = max(part.place.first_row + part.num_rows for part in parts)
    for num_rows in _numbers_of_rows(change):
        if num_rows != total:
            raise ValueError(f"{name} has {num_rows} outputs, where this model has {total}")
    by_layer = {}
    for part in parts:
        first = part.place.first_row
        rows = torch.arange(first, first + part.num_rows)
        if part.place.swaps_halves:
            rows = rows.roll(part.num_rows // 2)
        is_whole = torch.equal(rows, torch.arange(total))
        by_layer[part.layer] = change if is_whole else _take_rows(name, change, rows)
    return by_layer


def _numbers_of_rows(change: StoredChange) -> list[int]:
    """The number of outputs that each tensor of a change is made for."""
    numbers = []
    if change.form == "lokr":
        numbers.append(_num_rows(_left(change)) * _num_rows(_right(change)))
    for key in (*_BY_OUTPUT.get(change.form, ()), *_BESIDE):
        if key in change.tensors:
            numbers.append(_num_rows(change.tensors[key]))
    numbers += [_num_rows(value) for value in change.replacements.values()]
    return numbers


def _num_rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 0


def _take_rows(name: str, change: StoredChange, rows: Tensor) -> StoredChange:
    """The change with some of its rows alone, in the order given."""
    if "input_magnitude" in change.tensors:
        raise ValueError(
            f"{name} is divided by norms over all the layers that it holds in one, so it cannot be split; "
            f"{_remedy()}"
        )
    tensors = dict(change.tensors)
    if change.form == "lokr":
        tensors |= _kron_rows(name, change, rows)
    for key in (*_BY_OUTPUT.get(change.form, ()), *_BESIDE):
        if key in tensors:
            tensors[key] = tensors[key][rows]
    if change.form == "lora":
        # Trainers that split a weight themselves store a block-diagonal up: the other blocks are zeros here.
        is_used = (tensors["up"] != 0).any(dim=0)  # (r,)
        if is_used.any() and len(is_used) == len(tensors["down"]):
            tensors["up"] = tensors["up"][:, is_used]
            tensors["down"] = tensors["down"][is_used]
    replacements = {key: value[rows] for key, value in change.replacements.items()}
    return replace(change, tensors=tensors, replacements=replacements)


def _kron_rows(name: str, change: StoredChange, rows: Tensor) -> dict[str, Tensor]:
    """Row `i c + j` of a Kronecker product is row i of the left factor by row j of the right one, of c rows.

    So a piece of whole runs of c rows is a Kronecker product with some rows of the left factor.
    """
    height = _num_rows(_right(change))
    runs = rows[: len(rows) // height * height].reshape(-1, height)
    first_rows = runs[:, 0]
    is_whole_runs = (
        len(rows) % height == 0
        and (first_rows % height == 0).all()
        and torch.equal(runs, first_rows[:, None] + torch.arange(height))
    )
    if not is_whole_runs:
        raise ValueError(
            f"{name} is a LoKr of {len(_left(change))} x {height} outputs over several layers in one, and no "
            f"Kronecker product in each of them, so it cannot be split; {_remedy()}"
        )
    key = "left" if "left" in change.tensors else "left_up"
    return {key: change.tensors[key][first_rows // height]}


def _left(change: StoredChange) -> Tensor:
    return change.tensors["left"] if "left" in change.tensors else change.tensors["left_up"]


def _right(change: StoredChange) -> Tensor:
    return change.tensors["right"] if "right" in change.tensors else change.tensors["up"]


def _remedy() -> str:
    return (
        "merge it into the base with the program that wrote it, then `diffadapt extract` makes an adapter of "
        "the difference"
    )
