"""Blocks of a frozen denoiser that wait in main memory and come to the device when they run.

diffusers' `enable_group_offload` is made for sampling. It takes a block's weights away after the forward
pass, but the backward pass needs them again, also those of frozen layers; and with gradient checkpointing the
blocks that the backward pass computes again stay on the device. Here a block comes back for its backward
pass, and what was used longest ago makes room. The backward pass meets the blocks in the opposite order, so
those that the forward pass has left on the device come first.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class BlockOffload:
    """Keeps a limited number of a denoiser's blocks on the device; everything beside the blocks stays there.

    Weights that are trained are not moved away.

    Args:
        denoiser: in main memory, with frozen weights.
        device: that computes.
        resident: how many blocks are on the device at a time.

    Raises:
        ValueError: the denoiser has no blocks, or no more than `resident`, or quantised weights, whose scales
            are no part of their values.
    """

    def __init__(self, denoiser: nn.Module, device: torch.device, resident: int):
        self.device = device
        self.resident = resident
        self._loaded: OrderedDict[nn.Module, None] = OrderedDict()  # the one used last comes last
        self._host: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}  # block -> weights, their values
        self._hooks: list[RemovableHandle] = []
        blocks = outermost_blocks(denoiser)
        if resident >= len(blocks):
            raise ValueError(
                f"--offload_blocks {resident} keeps as many blocks on the device as this "
                f"{type(denoiser).__name__} has ({len(blocks)}); give a smaller number, or leave it out"
            )
        waiting: set[Tensor] = set()
        for block in blocks:
            self._host[block] = self._values(block)
            waiting.update(weight for weight, _ in self._host[block])
            self._hooks.append(block.register_forward_pre_hook(self._before_forward))
            self._hooks.append(block.register_forward_hook(self._after_forward))
        for weight in [*denoiser.parameters(), *denoiser.buffers()]:
            if weight not in waiting:
                weight.data = weight.data.to(device)

    def remove(self) -> None:
        """Ends it: all blocks are in main memory, and come no more."""
        for block in list(self._loaded):
            self._unload(block)
        self._loaded.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def load(self, block: nn.Module) -> None:
        """Brings a block to the device; the one that was used longest ago makes room for it."""
        if block in self._loaded:
            self._loaded.move_to_end(block)
            return
        while len(self._loaded) >= self.resident:
            oldest, _ = self._loaded.popitem(last=False)
            self._unload(oldest)
        for weight, value in self._host[block]:
            weight.data = value.to(self.device, non_blocking=True)
        self._loaded[block] = None

    def _unload(self, block: nn.Module) -> None:
        # Frozen weights have not changed, so nothing is copied back.
        for weight, value in self._host[block]:
            weight.data = value

    def _values(self, block: nn.Module) -> list[tuple[Tensor, Tensor]]:
        values = []
        for weight in [*block.parameters(), *block.buffers()]:
            if type(weight) not in (Tensor, nn.Parameter):
                raise ValueError(
                    f"--offload_blocks moves plain weights, not those of type {type(weight).__name__}: leave "
                    "it or the quantisation (--base_precision, --transformer) out"
                )
            if not weight.requires_grad:
                # Copies to a GPU are asynchronous from pinned memory only.
                value = weight.data.pin_memory() if self.device.type == "cuda" else weight.data
                weight.data = value
                values.append((weight, value))
        return values

    def _before_forward(self, block: nn.Module, inputs: object) -> None:
        self.load(block)

    def _after_forward(self, block: nn.Module, inputs: object, output: object) -> None:
        # The gradient of an output is there before anything of the block's backward pass runs.
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda gradient: self.load(block))


def outermost_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The blocks that a diffusers model names as its repeated ones, without those inside another."""
    names = set(getattr(denoiser, "_no_split_modules", None) or ())
    blocks: list[nn.Module] = []
    inner: set[nn.Module] = set()
    for module in denoiser.modules():
        if type(module).__name__ in names and module not in inner:
            blocks.append(module)
            inner.update(module.modules())
    return blocks
