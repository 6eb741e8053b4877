"""A trial export before training: whether an adapter can be exported once it is trained."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.architectures import Architecture
from diffadapt.formats.export.exported_layer import ExportedLayer, exported_layers
from diffadapt.formats.export.layer_names import (
    base_architecture,
    found_by_comfyui,
    has_diffusers_names,
)
from diffadapt.formats.export.target import ExportJob
from diffadapt.formats.export.targets import TARGETS

GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")  # of convolutions
TRIAL_SIZE = 0.02  # standard deviation of what is added to the trained tensors for the trial


def obstacle(adapter: Adapter, to: str) -> str | None:
    """The reason why the adapter could not be exported after training; None where it could.

    A new adapter often changes nothing yet, which every format can hold. So the trained tensors get random
    values for the trial, and their own bits back. One layer of each form is written to a temporary file and
    verified.

    Args:
        to: name of the target.
    """
    with _perturbed(adapter):
        try:
            _try_export(adapter, to)
        except Exception as error:  # of any kind: a device may lack float64, or memory
            return str(error) or type(error).__name__
    return None


@contextmanager
def _perturbed(adapter: Adapter) -> Iterator[None]:
    """Within the context every trained tensor differs from its start."""
    parameters = list(adapter.parameters())
    original_values = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in parameters:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((TRIAL_SIZE * noise).to(parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, original_values, strict=True):
                parameter.copy_(value)


def _try_export(adapter: Adapter, to: str) -> None:
    """Raises ValueError where `export` would."""
    target = TARGETS[to]
    job = ExportJob(adapter, exported_layers(adapter))
    job = replace(job, layers=target.fit(job))
    if target.is_folder:  # it holds whole weights, of any change
        return
    job = replace(job, layers=_one_of_each_form(job.layers, base_architecture(adapter)))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trial.safetensors"
        target.write(job, path)
        verdicts = target.verify(job, path)
    for verdict in verdicts:
        if verdict.program in target.meant_for and not verdict.accepted:
            raise ValueError(f"{verdict.program} {verdict.version} would not read it right: {verdict.reason}")


def _one_of_each_form(layers: Sequence[ExportedLayer], base: Architecture) -> list[ExportedLayer]:
    """The first layer of each kind, shape and form of change: the others would have the same verdict."""
    examples: dict[Hashable, ExportedLayer] = {}
    for layer in layers:
        examples.setdefault(_form_key(layer, base), layer)
    return list(examples.values())


def _form_key(layer: ExportedLayer, base: Architecture) -> Hashable:
    """All that decides how a change is written and read."""
    geometry = tuple(str(getattr(layer.layer, name, None)) for name in GEOMETRY)
    return (
        layer.component,
        layer.kind,
        tuple(layer.shape),
        geometry,
        type(layer.factors),
        layer.is_dense,
        layer.scale is None,
        layer.base_bias is None,
        layer.bias is None,
        _name_key(layer, base),
    )


def _name_key(layer: ExportedLayer, base: Architecture) -> Hashable:
    """All of a layer's name that decides whether ComfyUI finds it, and how."""
    if not has_diffusers_names(base):
        return found_by_comfyui(layer)
    place = base.published_names.original_layer(layer.path)
    is_swapped = place is not None and place.swaps_halves
    return re.sub(r"\d+", "#", layer.path), is_swapped
