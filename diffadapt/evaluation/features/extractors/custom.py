"""Extractors of users: any importable class that keeps `base.CONTRACT`, named `module:Class`."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from pathlib import Path

from torch import Tensor, nn

from diffadapt.common.safetensors_file import hash_tensors
from diffadapt.evaluation.features.extractors.base import CONTRACT, Extractor, frozen


def custom(name: str, *, preset: str | None, device: str) -> Extractor:
    """The extractor of a class.

    Args:
        name: `module:Class`; modules in the current folder are found too.
        preset: of the resize; None: the class's own, else `clean`.
        device: of the network, if it is a torch module.

    Raises:
        ValueError: the class cannot be imported or does not keep the contract.
    """
    try:
        extractor_class = import_class(name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the extractor {name!r} cannot be imported: {error}") from None
    model = extractor_class()
    if not callable(model) or not isinstance(getattr(model, "side", None), int):
        raise ValueError(f"{name!r} does not keep the contract of an extractor: {CONTRACT}")
    if isinstance(model, nn.Module):
        frozen(model, device)
    feature_layer = _string_attribute(model, "features") or "features"
    logit_layer = _string_attribute(model, "logits")
    layers = (feature_layer,)
    if logit_layer is not None and logit_layer != feature_layer:
        layers = (feature_layer, logit_layer)

    def network(pixels: Tensor) -> dict[str, Tensor]:
        output = model(pixels.to(device))
        outputs = {feature_layer: output} if isinstance(output, Tensor) else output
        for layer in layers:
            if layer not in outputs or outputs[layer].ndim != 2 or len(outputs[layer]) != len(pixels):
                raise ValueError(f"{name!r} gave no (B, D) tensor {layer!r}; the contract: {CONTRACT}")
        return outputs

    return Extractor(
        name=name,
        sha256=source_sha256(extractor_class, model),
        side=model.side,
        preset=preset or getattr(model, "preset", "clean"),
        layers=layers,
        feature_layer=feature_layer,
        network=network,
        logit_layer=logit_layer,
    )


def import_class(name: str) -> type:
    """The class `module:Class`; modules in the current folder are found too.

    Raises:
        ImportError, AttributeError: it cannot be imported.
    """
    module_name, _, class_name = name.partition(":")
    if os.getcwd() not in sys.path:  # a script has its own folder there instead
        sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module_name), class_name)


def source_sha256(model_class: type, model: object) -> str:
    """SHA-256 over the source file of a class and, of a torch module, its tensors."""
    source = inspect.getsourcefile(model_class)  # None for a class of an interactive session
    hasher = hashlib.sha256(Path(source).read_bytes() if source else model_class.__qualname__.encode())
    if isinstance(model, nn.Module):
        hasher.update(hash_tensors(model.state_dict()).encode())
    return hasher.hexdigest()


def _string_attribute(model: object, name: str) -> str | None:
    """An attribute if it is a string: a torch module may use the name for a layer."""
    value = getattr(model, name, None)
    return value if isinstance(value, str) else None
