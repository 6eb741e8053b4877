"""An estimate of a step's memory: counted where it can be, measured in one forward pass."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from diffadapt.adapters.quantised_layers import stored_bytes
from diffadapt.data.batches import Batches
from diffadapt.training.loop import TrainState, attention_kernel, positions
from diffadapt.training.optimizers import state_values


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. What a recomputed block needs for a moment (`--gradient_checkpointing`) is not in it."""

    base: int  # all models of the pipeline, as they are loaded
    training: int  # trained tensors, their gradients, optimizer state and moving average
    activations: int  # kept for the backward pass of one microstep

    @property
    def total(self) -> int:
        """The sum of the three."""
        return self.base + self.training + self.activations

    def __str__(self) -> str:
        return (
            f"about {size_text(self.total)}: base {size_text(self.base)}, "
            f"adapter and optimizer {size_text(self.training)}, activations {size_text(self.activations)}"
        )


def estimate_memory(train_state: TrainState, batches: Batches, pipe: DiffusionPipeline) -> MemoryEstimate:
    """Counts the models, and what one forward pass at the run's batch size keeps; changes no state.

    Raises:
        ValueError: the device's memory does not suffice for that pass; the message has the remedy.
    """
    options = train_state.options
    base_tensors: list[Tensor] = []
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            base_tensors += [*module.parameters(), *module.buffers()]
    trained_bytes = _bytes(p for p in train_state.adapter.parameters() if p.requires_grad)
    # A trained value has beside itself a gradient, the optimizer's values and, with --use_ema, an average.
    copies = 2 + state_values(options) + bool(options.use_ema)
    try:
        activation_bytes = _bytes_kept_by_forward(train_state, batches, base_tensors)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"a batch of {options.train_batch_size} does not fit into memory ({error}); lower "
            "--train_batch_size or --resolution, or use --gradient_checkpointing"
        ) from None
    return MemoryEstimate(_bytes(base_tensors), int(trained_bytes * copies), activation_bytes)


@contextmanager
def kept_storages(excluded: Iterable[Tensor]) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Collects what autograd keeps for the backward pass within the context, each storage once.

    Args:
        excluded: tensors whose storages are not counted, such as weights.
    """
    # by storage, since autograd may keep a view or a detached tensor of the same memory
    excluded_storages = {tensor.untyped_storage()._cdata for tensor in excluded}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in excluded_storages:
            storages[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield storages


def size_text(count: int) -> str:
    """Bytes in words: 1.5 GiB, 20.0 MiB, 3.1 KiB."""
    for exponent, unit in ((30, "GiB"), (20, "MiB")):
        if count >= 2**exponent:
            return f"{count / 2**exponent:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"


def _bytes_kept_by_forward(train_state: TrainState, batches: Batches, base_tensors: list[Tensor]) -> int:
    """Bytes of the tensors that autograd keeps, without those of the models."""
    accelerator = train_state.accelerator
    objective = accelerator.unwrap_model(train_state.objective)
    batch = batches.batch(positions(train_state, 0)).to(accelerator.device)
    train_state.adapter.set_dropout_seed(0)
    weights = [*base_tensors, *train_state.adapter.parameters()]
    with kept_storages(weights) as storages, accelerator.autocast(), attention_kernel(batch):
        objective.forward(batch)
    return sum(storage.nbytes() for storage in storages.values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(stored_bytes(tensor) for tensor in tensors)
