"""How much memory a step takes, before the first one: counted where it can be, measured in one forward."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from diffadapt.data.batches import Batches
from diffadapt.training.loop import TrainState, attention, positions
from diffadapt.training.optimizers import state_values


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. What a recomputed block needs for a moment (`--gradient_checkpointing`) is not in it."""

    base: int  # all models of the pipeline, as they are loaded
    training: int  # trained tensors, their gradients, optimizer state and moving average
    activations: int  # kept for the backward pass of one microstep

    @property
    def total(self) -> int:
        return self.base + self.training + self.activations

    def __str__(self) -> str:
        parts = {"base": self.base, "adapter and optimizer": self.training, "activations": self.activations}
        listed = ", ".join(f"{name} {size_text(value)}" for name, value in parts.items())
        return f"about {size_text(self.total)}: {listed}"


def estimate_memory(train_state: TrainState, batches: Batches, pipe: DiffusionPipeline) -> MemoryEstimate:
    """Counts the models, and what one forward pass at the run's batch size keeps. No training state changes.

    Raises: ValueError with the remedy when the device's memory does not suffice for that.
    """
    models = [module for module in pipe.components.values() if isinstance(module, nn.Module)]
    weights = [tensor for model in models for tensor in [*model.parameters(), *model.buffers()]]
    trained = _bytes([p for p in train_state.adapter.parameters() if p.requires_grad])
    copies = (
        2 + state_values(train_state.options) + bool(train_state.options.use_ema)
    )  # itself, gradient, state
    try:
        activations = _kept_by_forward(train_state, batches, weights)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"a batch of {train_state.options.train_batch_size} does not fit into memory ({error}); lower "
            "--train_batch_size or --resolution, or use --gradient_checkpointing"
        ) from None
    return MemoryEstimate(_bytes(weights), int(trained * copies), activations)


def _kept_by_forward(train_state: TrainState, batches: Batches, weights: list[Tensor]) -> int:
    """Bytes of the tensors that autograd keeps, each storage once, without those of the models."""
    objective, accelerator = (
        train_state.accelerator.unwrap_model(train_state.objective),
        train_state.accelerator,
    )
    batch = batches.batch(positions(train_state, 0)).to(accelerator.device)
    train_state.adapter.set_dropout_seed(0)
    owned = [*weights, *train_state.adapter.parameters()]
    with kept_storages(owned) as kept, accelerator.autocast(), attention(batch.latents):
        objective.forward(batch)
    return sum(storage.nbytes() for storage in kept.values())


@contextmanager
def kept_storages(owned: Iterable[Tensor]) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Collects what autograd keeps for backward within the context: each storage once, none of `owned`."""
    known = {tensor.untyped_storage()._cdata for tensor in owned}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def size_text(count: int) -> str:
    """Bytes in words: 1.5 GiB, 20.0 MiB, 3.1 KiB."""
    for exponent, unit in ((30, "GiB"), (20, "MiB")):
        if count >= 2**exponent:
            return f"{count / 2**exponent:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"
