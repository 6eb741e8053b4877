"""Merging adapters into the weights of their model, and taking them out again."""

from __future__ import annotations

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.fold import fold_merged


def merge(adapter: Adapter) -> float:
    """Folds the adapter into the weights of its model, so that it costs nothing to run.

    Returns:
        The share of the change lost to rounding in half precision, `|W' - rounded W'| / |W' - W|` in
        Frobenius norms over all sites; 0 for float32 and float64 bases.

    Raises:
        ValueError: a weight is quantised, so that it cannot hold the change.
    """
    for name, layer_state in adapter.layer_states.items():
        if layer_state.quantised is not None:
            raise ValueError(
                f"{name} is quantised ({layer_state.quantised.kind.name}), and quantising it anew would "
                "round the adapter away; load the base in bfloat16 or float32, load the adapter, and merge"
            )
    return _set_merged(adapter, True)


def unmerge(adapter: Adapter) -> None:
    """Takes the adapter out of the weights; without merged adapters they get their original bits back."""
    _set_merged(adapter, False)


def _set_merged(adapter: Adapter, merged: bool) -> float:
    for part in adapter.parts:
        part.merged = merged
    for layer_state in adapter.layer_states.values():
        for entry in adapter.entries(layer_state):
            entry.merged = merged
    # weights are computed anew from the base's bits and all merged entries, those of other adapters included
    return fold_merged(adapter.layer_states.values(), adapter.roots.values())
