"""Fingerprints of a base: enough of its weights to tell whether an adapter was trained on them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from diffadapt.adapters.layers import LayerState

VALUES_PER_LAYER = 64
# keys of the fingerprints in an adapter file that are taken of rounded values
ROUNDED = {"values_float16": torch.float16, "values_bfloat16": torch.bfloat16}


def fingerprint(layer_states: Sequence[LayerState]) -> str:
    """A hash of a sample of the base weights: the same for the same values at the same precision."""
    return fingerprints(layer_states)["values"]


def quantisation(layer_states: Sequence[LayerState]) -> str | None:
    """How a base's weights are stored, e.g. `bitsandbytes nf4`; None where none of them is quantised."""
    names = set()
    for layer_state in layer_states:
        if layer_state.quantised is not None:
            names.add(layer_state.quantised.kind.name)
    return ", ".join(sorted(names)) or None


def fingerprints(layer_states: Sequence[LayerState]) -> dict[str, str]:
    """Hashes of a sample of the base weights as they are, and as rounded to the half precisions.

    A base and its copy in half precision have one of the hashes in common, two fine-tuned models none. Of a
    quantised base they are those of the dequantised values.

    Returns:
        The key in an adapter file (`values` and those of `ROUNDED`) -> 32 hexadecimal digits.
    """
    hashers = {key: hashlib.sha256() for key in ("values", *ROUNDED)}
    for layer_state in layer_states:
        weight = layer_state.base().reshape(-1)
        step = max(1, weight.numel() // VALUES_PER_LAYER)
        # Spread over the whole weight: fine-tuning may leave single rows as they were.
        # Cloned, since a NumPy view would keep the weight's own storage alive
        sample = weight[::step][:VALUES_PER_LAYER].float().cpu().clone()
        for key, hasher in hashers.items():
            # back to float32, so that a base stored in the half precision hashes the same bytes
            rounded = sample.to(ROUNDED[key]).float() if key in ROUNDED else sample
            hasher.update(rounded.numpy().tobytes())
    return {key: hasher.hexdigest()[:32] for key, hasher in hashers.items()}
