"""Offloading to main memory of models that no training step needs, mostly the encoders.

Images and captions are encoded before the first step; after that, encoders are only needed to generate
images. In float32 they take 0.8 GB for Stable Diffusion 1.5, 3.6 GB for XL.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from diffadapt.common.pipeline_components import AUTOENCODER
from diffadapt.data.batches import Batches
from diffadapt.models.base import BaseModel


def unused_encoders(model: BaseModel, batches: Batches) -> list[nn.Module]:
    """The models of the pipeline that steps do not use, as everything they would encode is encoded."""
    used = {model.denoiser_name}
    if batches.is_streaming or batches.cache is None:
        used.add(AUTOENCODER)
    if batches.is_streaming or model.train_text_encoder:
        used |= model.text_encoders.keys()
    unused = []
    for name, component in model.pipe.components.items():
        if isinstance(component, nn.Module) and name not in used:
            unused.append(component)
    return unused


@contextmanager
def offloaded(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Within the context the modules are in main memory and not on `device`; on a CPU nothing moves."""
    _move(modules, torch.device("cpu"), device)
    try:
        yield
    finally:
        _move(modules, device, device)


@contextmanager
def onloaded(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside `offloaded`: the modules are back on `device`, to generate images with."""
    _move(modules, device, device)
    try:
        yield
    finally:
        _move(modules, torch.device("cpu"), device)


def _move(modules: Sequence[nn.Module], target: torch.device, device: torch.device) -> None:
    if device.type == "cpu":
        return
    for module in modules:
        module.to(target)
    # The freed blocks would otherwise stay with PyTorch's allocator.
    if target.type == "cpu":
        torch.accelerator.empty_cache()
