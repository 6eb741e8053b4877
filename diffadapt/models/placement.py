"""Where the components of a base are: on the device that computes while they are needed, else in main memory.

A text encoder of 9 GB and a denoiser of 22 GB then need not fit on a device together. Nothing moves where the
device is a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from diffadapt.common.pipeline_components import DENOISERS, is_text_encoder
from diffadapt.models.block_offload import BlockOffload

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MAIN_MEMORY = torch.device("cpu")


class Placement:
    """Moves the components of one pipeline, which are named as the pipeline names them.

    Args:
        pipe: the pipeline.
        device: the device that computes; None to leave everything where it is.
        text_encoder_device: the device that the text encoders compute on; None for `device`.
        resident_blocks: how many of the denoiser's blocks are on `device` at a time; None for all.
        load_denoiser: gives the denoiser with its weights, where the pipeline's has only shapes yet.
        is_staged: whether everything is in main memory now, and on the device only while it is needed.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        device: torch.device | None = None,
        *,
        text_encoder_device: torch.device | None = None,
        resident_blocks: int | None = None,
        load_denoiser: Callable[[], nn.Module] | None = None,
        is_staged: bool = False,
    ):
        self.pipe = pipe
        self.device = device
        self.text_encoder_device = text_encoder_device or device
        self.is_staged = is_staged and device is not None
        self.resident_blocks = resident_blocks
        self._load_denoiser = load_denoiser
        self._block_offload: BlockOffload | None = None
        self._on_device: set[str] = set()
        self._removed: dict[str, nn.Module] = {}

    def to_device(self, names: Iterable[str]) -> None:
        """Brings components to their device, where they stay."""
        if not self.is_staged:
            return
        for name in sorted(set(names) - self._on_device):
            component = getattr(self.pipe, name, None)
            if not isinstance(component, nn.Module):
                continue
            if name in DENOISERS and self.resident_blocks is not None:
                self._block_offload = BlockOffload(component, self.device, self.resident_blocks)
            else:
                move(component, self.text_encoder_device if is_text_encoder(name) else self.device)
            self._on_device.add(name)

    @contextmanager
    def on_device(self, names: Iterable[str]) -> Iterator[None]:
        """Within the context components are on their device; those that came there leave it at the end."""
        visiting = set(names) - self._on_device
        self.to_device(visiting)
        visiting &= self._on_device
        try:
            yield
        finally:
            for name in sorted(visiting):
                if name in DENOISERS and self._block_offload is not None:
                    self._block_offload.remove()
                move(getattr(self.pipe, name), MAIN_MEMORY)
            self._on_device -= visiting

    def load_denoiser(self) -> None:
        """Loads the weights of a denoiser that has only shapes yet, into main memory."""
        if self._load_denoiser is None:
            return
        (name,) = (name for name in DENOISERS if getattr(self.pipe, name, None) is not None)
        self.pipe.register_modules(**{name: self._load_denoiser()})
        self._load_denoiser = None

    def release(self, names: Iterable[str], *, keep: bool = False) -> None:
        """Takes components out of the pipeline for good, so that their memory is free.

        Args:
            names: those that nothing needs any more.
            keep: hold them in main memory for `restored`.
        """
        for name in names:
            if keep:
                self._removed[name] = getattr(self.pipe, name)
            self.pipe.register_modules(**{name: None})

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within the context the pipeline has the components again that `release` kept."""
        self.pipe.register_modules(**self._removed)
        try:
            yield
        finally:
            self.pipe.register_modules(**dict.fromkeys(self._removed))


def move(module: nn.Module, device: torch.device) -> None:
    """Moves a module; what it leaves on an accelerator is given back, and not kept for later tensors."""
    module.to(device)
    if device.type == "cpu" and torch.accelerator.is_available():
        torch.accelerator.empty_cache()
