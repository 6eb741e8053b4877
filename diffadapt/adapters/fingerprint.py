"""Fingerprints of a base: enough of its weights to tell whether an adapter was trained on them."""

import hashlib
from collections.abc import Sequence

import torch

from diffadapt.adapters.layers import Record

SAMPLE = 64  # values of each layer
ROUNDED = {"values_float16": torch.float16, "values_bfloat16": torch.bfloat16}


def fingerprint(records: Sequence[Record]) -> str:
    """A hash of a sample of the base weights: the same for the same values at the same precision."""
    return fingerprints(records)["values"]


def fingerprints(records: Sequence[Record]) -> dict[str, str]:
    """Hashes of a sample of the base weights as they are (``values``) and as rounded to the half precisions:
    a base and its copy in half precision have one of them in common, two fine-tunes have none."""
    hashers = {key: hashlib.sha256() for key in ("values", *ROUNDED)}
    for record in records:
        flat = record.base().reshape(-1)
        step = max(1, flat.numel() // SAMPLE)
        sample = flat[::step][:SAMPLE].float().cpu().clone()  # numpy would pin the weight's own storage
        for key, hasher in hashers.items():
            kept = sample.to(ROUNDED[key]).float() if key in ROUNDED else sample
            hasher.update(kept.numpy().tobytes())
    return {key: hasher.hexdigest()[:32] for key, hasher in hashers.items()}
