"""Fingerprints of a base: enough of its weights to tell whether an adapter was trained on them."""

import hashlib
from collections.abc import Sequence

import torch

from diffadapt.adapters.layers import LayerState

SAMPLE = 64  # values of each layer
ROUNDED = {"values_float16": torch.float16, "values_bfloat16": torch.bfloat16}


def fingerprint(layer_states: Sequence[LayerState]) -> str:
    """A hash of a sample of the base weights: the same for the same values at the same precision."""
    return fingerprints(layer_states)["values"]


def fingerprints(layer_states: Sequence[LayerState]) -> dict[str, str]:
    """Hashes of a sample of the base weights as they are (``values``) and as rounded to the half precisions:
    a base and its copy in half precision have one of them in common, two fine-tunes have none."""
    hashers = {key: hashlib.sha256() for key in ("values", *ROUNDED)}
    for layer_state in layer_states:
        flat = layer_state.base().reshape(-1)
        step = max(1, flat.numel() // SAMPLE)
        sample = flat[::step][:SAMPLE].float().cpu().clone()  # numpy would pin the weight's own storage
        for key, hasher in hashers.items():
            kept = sample.to(ROUNDED[key]).float() if key in ROUNDED else sample
            hasher.update(kept.numpy().tobytes())
    return {key: hasher.hexdigest()[:32] for key, hasher in hashers.items()}
