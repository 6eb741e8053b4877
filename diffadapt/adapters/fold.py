"""The weights and biases of layers under their adapters, and writing them into the layers.

Merged weights are always computed from the base's original bits, which are kept while an adapter is merged:
nothing is ever subtracted, so unmerging gives every bit back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from diffadapt.adapters.class_table import sync_table_sizes
from diffadapt.adapters.layers import Entry, LayerState
from diffadapt.algebra.combined_weight import (
    HALF,
    changed_weight,
    effective_bias,
    start_weight,
    to_compute_dtype,
)
from diffadapt.algebra.expression import Update


@torch.no_grad()
def adapted_weight(layer_state: LayerState, entries: Sequence[Entry]) -> Tensor:
    """`W + sum_i t_i (W'_i - W)` over some entries of a layer.

    Returns:
        A tensor of the weight's own shape, float32 (float64 on a float64 base). A class table for more
        classes than the base's has more rows.
    """
    return _weight(layer_state, layer_state.updates(entries))


@torch.no_grad()
def adapted_biases(layer_state: LayerState, entries: Sequence[Entry]) -> list[Tensor | None]:
    """`b + sum_i t_i (b'_i - b)` for each layer that shares the weight; None where there is no bias."""
    return _biases(layer_state, layer_state.updates(entries))


@torch.no_grad()
def fold_merged(layer_states: Iterable[LayerState], models: Iterable[nn.Module]) -> float:
    """Writes into the layers what their merged entries say; layers without one get their original bits back.

    Args:
        layer_states: of the layers to write.
        models: that hold these layers; their configurations follow class tables that change size.

    Returns:
        The share of the change lost to rounding in half precision, `|W' - rounded W'| / |W' - W|` in
        Frobenius norms over all layers; 0 for float32 and float64 bases.
    """
    # squared norms add up over layers
    lost = 0.0
    changed = 0.0
    for layer_state in layer_states:
        merged = [entry for entry in layer_state.entries if entry.merged]
        if not merged:
            _restore(layer_state)
            continue
        layer_lost, layer_changed = _fold(layer_state, merged)
        lost += layer_lost
        changed += layer_changed
    sync_table_sizes(models)
    return (lost / changed) ** 0.5 if changed else 0.0


def _fold(layer_state: LayerState, merged: Sequence[Entry]) -> tuple[float, float]:
    """Writes one layer's weight and biases; returns the squared norms of its rounding and of its change."""
    first = layer_state.layers[0]
    if layer_state.original is None:  # nothing was merged here before
        biases = [layer_state.base_bias(layer) for layer in layer_state.layers]
        layer_state.original_biases = [None if bias is None else bias.clone() for bias in biases]
        layer_state.original = first.weight.detach().clone()
    updates = layer_state.updates(merged)
    weight = _weight(layer_state, updates)
    _set_weight(first, weight)  # of one layer: all others hold the same parameter
    _set_biases(layer_state.layers, _biases(layer_state, updates))
    if first.weight.dtype not in HALF:  # float32 and float64 hold the sum as it was computed
        return 0.0, 0.0
    start = layer_state.original
    if start.shape != weight.shape:  # a class table with new rows
        start = start_weight(to_compute_dtype(start), updates)
    rounding = weight - first.weight
    change = weight - start
    return rounding.square().sum().item(), change.square().sum().item()


def _restore(layer_state: LayerState) -> None:
    """Gives a layer its original weight and biases back."""
    if layer_state.original is None:
        return
    _set_weight(layer_state.layers[0], layer_state.original)
    _set_biases(layer_state.layers, layer_state.original_biases)
    layer_state.original = None
    layer_state.original_biases = []


def _weight(layer_state: LayerState, updates: Sequence[tuple[float, Update]]) -> Tensor:
    return changed_weight(to_compute_dtype(layer_state.base()), updates)


def _biases(layer_state: LayerState, updates: Sequence[tuple[float, Update]]) -> list[Tensor | None]:
    biases = []
    for layer in layer_state.layers:
        base = layer_state.base_bias(layer)
        if base is not None:
            base = to_compute_dtype(base)
        biases.append(effective_bias(base, base, updates))
    return biases


def _set_weight(layer: nn.Module, weight: Tensor) -> None:
    if layer.weight.shape == weight.shape:
        layer.weight.data.copy_(weight)
    else:  # a class table that gains rows, or loses them again
        layer.weight.data = weight.to(layer.weight.dtype, copy=True)


def _set_biases(layers: Sequence[nn.Module], biases: Sequence[Tensor | None]) -> None:
    for layer, bias in zip(layers, biases, strict=True):
        resident = getattr(layer, "bias", None)
        if bias is None and resident is not None:
            layer.bias = None  # the layer had none before a merged adapter gave it one
        elif bias is not None and resident is None:
            layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)
        elif bias is not None:
            resident.data.copy_(bias)
