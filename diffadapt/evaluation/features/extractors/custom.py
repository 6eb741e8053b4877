"""An extractor of one's own: any class that is importable, named `module:Class`."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from pathlib import Path

from torch import Tensor, nn

from diffadapt.common.safetensors_file import hash_tensors
from diffadapt.evaluation.features.extractors.base import Extractor, frozen

CONTRACT = (
    "it is made without arguments, has an integer `side`, and is called with (B, 3, side, side) float32 in "
    "[0, 255]; it returns (B, D), or a dictionary of such with the attributes `features` (a key, for "
    "distances) and, for the Inception Score, `logits` (a key); `preset` names its resize, else `clean`"
)


def custom(name: str, *, preset: str | None, device: str) -> Extractor:
    """`module:Class`; modules of the current folder are found too.

    Raises: ValueError when it cannot be imported or does not keep the contract above.
    """
    module_name, _, class_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        kind = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the extractor {name!r} cannot be imported: {error}") from None
    made = kind()
    if not callable(made) or not isinstance(getattr(made, "side", None), int):
        raise ValueError(f"{name!r} does not keep the contract of an extractor: {CONTRACT}")
    if isinstance(made, nn.Module):
        frozen(made, device)
    features = getattr(made, "features", None)
    features = features if isinstance(features, str) else "features"
    logits = getattr(made, "logits", None)
    logits = logits if isinstance(logits, str) else None

    def network(pixels: Tensor) -> dict[str, Tensor]:
        found = made(pixels.to(device))
        found = {features: found} if isinstance(found, Tensor) else found
        for layer in layers:
            if layer not in found or found[layer].ndim != 2 or len(found[layer]) != len(pixels):
                raise ValueError(f"{name!r} gave no (B, D) tensor {layer!r}; the contract: {CONTRACT}")
        return found

    layers = tuple(dict.fromkeys([features, logits] if logits else [features]))
    resize = preset or getattr(made, "preset", "clean")
    return Extractor(name, source_sha256(kind, made), made.side, resize, layers, features, network, logits)


def source_sha256(kind: type, made: object) -> str:
    """Over the source file and, of a module, its tensors."""
    source = inspect.getsourcefile(kind)
    hasher = hashlib.sha256(Path(source).read_bytes() if source else kind.__qualname__.encode())
    if isinstance(made, nn.Module):
        hasher.update(hash_tensors(made.state_dict()).encode())
    return hasher.hexdigest()
