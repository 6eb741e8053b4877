"""Fold adapters into the weights and take them out again: recomputed from the original, never subtracted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diffadapt.adapters.class_table import follow_rows
from diffadapt.adapters.layers import Entry, Record
from diffadapt.algebra.combined_weight import (
    HALF,
    changed_weight,
    effective_bias,
    start_weight,
    to_compute_dtype,
)

if TYPE_CHECKING:
    from diffadapt.adapters.adapter import Adapter


def merge(adapter: Adapter) -> float:
    """Fold the adapter into the weights of its model, so that it costs nothing to run.

    Returns: the share of the change lost to rounding in half precision, ``|W' - rounded W'| / |W' - W|`` in
    Frobenius norms over all sites; 0 for float32 and float64 bases.
    """
    for record in adapter.records.values():
        _flag(record, adapter, True)
    return refold(adapter)


def unmerge(adapter: Adapter) -> None:
    """Take the adapter out of the weights; without merged adapters they get their original bits back."""
    for record in adapter.records.values():
        _flag(record, adapter, False)
    refold(adapter)


def refold(adapter: Adapter) -> float:
    """Make the weights under an adapter what their merged entries say. Returns: as ``merge``."""
    lost = changed = 0.0
    for record in adapter.records.values():
        part_lost, part_changed = _refold(record)
        lost, changed = lost + part_lost, changed + part_changed
    follow_rows(adapter.roots.values())
    return (lost / changed) ** 0.5 if changed else 0.0


@torch.no_grad()
def folded(record: Record, entries: Sequence[Entry]) -> tuple[Tensor, list[Tensor | None]]:
    """``W + sum_i t_i (W'_i - W)`` over the entries, and each layer's bias, in the adapter's precision."""
    updates = record.updates(entries)
    weight = changed_weight(to_compute_dtype(record.base()), updates)
    bases = [record.base_bias(layer) for layer in record.layers]
    biases = [None if bias is None else to_compute_dtype(bias) for bias in bases]
    return weight, [effective_bias(bias, bias, updates) for bias in biases]


@torch.no_grad()
def _refold(record: Record) -> tuple[float, float]:
    """Make the resident weight what the merged entries say; return squared norms of rounding and change."""
    merged = [entry for entry in record.entries if entry.merged]
    first = record.layers[0]
    if not merged:
        if record.original is not None:
            _set_weight(first, record.original)
            _set_biases(record, record.original_biases)
            record.original, record.original_biases = None, []
        return 0.0, 0.0
    if record.original is None:
        biases = [record.base_bias(layer) for layer in record.layers]
        record.original_biases = [None if bias is None else bias.clone() for bias in biases]
        record.original = first.weight.detach().clone()
    weight, biases = folded(record, merged)
    _set_weight(first, weight)
    _set_biases(record, biases)
    if first.weight.dtype not in HALF:
        return 0.0, 0.0
    start = record.original
    if start.shape != weight.shape:
        start = start_weight(to_compute_dtype(start), record.updates(merged))
    rounding, change = weight - first.weight, weight - start
    return rounding.square().sum().item(), change.square().sum().item()


def _set_weight(layer: nn.Module, weight: Tensor) -> None:
    if layer.weight.shape == weight.shape:
        layer.weight.data.copy_(weight)
    else:  # a class table that gains rows, or loses them again
        layer.weight.data = weight.to(layer.weight.dtype, copy=True)


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
