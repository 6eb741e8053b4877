"""Fold adapters into the weights and take them out again: recomputed from the original, never subtracted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diffadapt.layers import HALF, Entry, Record, effective_bias, wide

if TYPE_CHECKING:
    from diffadapt.adapter import Adapter


def merge(adapter: Adapter) -> float:
    """Fold the adapter into the weights of its model, so that it costs nothing to run.

    Returns: the share of the change lost to rounding in half precision, ``|W' - rounded W'| / |W' - W|`` in
    Frobenius norms over all sites; 0 for float32 and float64 bases.
    """
    lost = changed = 0.0
    for record in adapter.records.values():
        _flag(record, adapter, True)
        part_lost, part_changed = refold(record)
        lost, changed = lost + part_lost, changed + part_changed
    return (lost / changed) ** 0.5 if changed else 0.0


def unmerge(adapter: Adapter) -> None:
    """Take the adapter out of the weights; without merged adapters they get their original bits back."""
    for record in adapter.records.values():
        _flag(record, adapter, False)
        refold(record)


@torch.no_grad()
def folded(record: Record, entries: Sequence[Entry]) -> tuple[Tensor, list[Tensor | None]]:
    """``W + sum_i t_i (W'_i - W)`` over the entries, and each layer's bias, in the adapter's precision."""
    base = wide(record.base())
    updates = [(entry.owner.strength, entry.owner.update(entry.index, record.base())) for entry in entries]
    weight = base
    for strength, update in updates:
        weight = weight + strength * (update.weight(base) - base)
    bases = [record.base_bias(layer) for layer in record.layers]
    biases = [None if bias is None else wide(bias) for bias in bases]
    return weight, [effective_bias(bias, bias, updates) for bias in biases]


@torch.no_grad()
def refold(record: Record) -> tuple[float, float]:
    """Make the resident weight what the merged entries say; return squared norms of rounding and change."""
    merged = [entry for entry in record.entries if entry.merged]
    first = record.layers[0]
    if not merged:
        if record.original is not None:
            first.weight.data.copy_(record.original)
            _set_biases(record, record.original_biases)
            record.original, record.original_biases = None, []
        return 0.0, 0.0
    if record.original is None:
        biases = [record.base_bias(layer) for layer in record.layers]
        record.original_biases = [None if bias is None else bias.clone() for bias in biases]
        record.original = first.weight.detach().clone()
    weight, biases = folded(record, merged)
    first.weight.data.copy_(weight)
    _set_biases(record, biases)
    if first.weight.dtype not in HALF:
        return 0.0, 0.0
    rounding, change = weight - first.weight, weight - record.original
    return rounding.square().sum().item(), change.square().sum().item()


def _set_biases(record: Record, biases: Sequence[Tensor | None]) -> None:
    for layer, bias in zip(record.layers, biases, strict=True):
        resident = getattr(layer, "bias", None)
        if bias is None and resident is not None:
            layer.bias = None  # the layer had none before a merged adapter gave it one
        elif bias is not None and resident is None:
            layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)
        elif bias is not None:
            resident.data.copy_(bias)


def _flag(record: Record, adapter: Adapter, merged: bool) -> None:
    for entry in record.entries:
        if entry.owner in adapter.owners:
            entry.merged = entry.owner.merged = merged
