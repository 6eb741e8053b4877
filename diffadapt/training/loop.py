"""The training loop, as a generator: `for step in train(...)` yields after every optimizer step.

What to do then (log, save, validate, stop) is the script's business and stands in the script.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffadapt.adapter import Adapter
from diffadapt.data.batches import Batches
from diffadapt.data.randomness import seed_from
from diffadapt.training.objective import Objective
from diffadapt.training.options import TrainOptions

SMALL_ATTENTION = 1024  # tokens up to which plain attention beats the fused kernel's backward on a CPU
WARMUP_SHARE = 0.1  # of the run, at most


@dataclass(frozen=True)
class Step:
    """One optimizer step that was made."""

    index: int  # 1 is the first
    loss: float  # mean over microsteps and processes
    lr: float  # the rate it was made with
    grad_norm: float  # before clipping
    images: int  # pictures in it, over all processes
    seconds: float


@dataclass
class Trainer:
    """Everything that changes while training, and the position in the run."""

    accelerator: Accelerator
    objective: torch.nn.Module  # as prepared by accelerate
    adapter: Adapter
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    options: TrainOptions
    step: int = 0  # optimizer steps made

    @property
    def batch_size(self) -> int:
        """Samples per optimizer step over all processes."""
        return (
            self.options.train_batch_size
            * self.options.gradient_accumulation_steps
            * self.accelerator.num_processes
        )


def prepare(accelerator: Accelerator, objective: Objective, options: TrainOptions) -> Trainer:
    """Optimizer, schedule and the wrapped objective, at step 0."""
    adapter = objective.adapter
    optimizer = torch.optim.AdamW(
        [p for p in adapter.parameters() if p.requires_grad],
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
    )
    scheduler = get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=warmup_steps(options),
        num_training_steps=options.max_train_steps,
    )
    if options.gradient_checkpointing:
        objective.denoiser.enable_gradient_checkpointing()  # non-reentrant in diffusers
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    wrapped.train()
    objective.denoiser.eval()  # a base's own dropout would be randomness without a key
    return Trainer(accelerator, wrapped, adapter, optimizer, scheduler, options)


def warmup_steps(options: TrainOptions) -> int:
    """Warm-up steps as used: a long warm-up would be the whole of a short run."""
    return min(options.lr_warmup_steps, int(WARMUP_SHARE * options.max_train_steps))


def train(trainer: Trainer, batches: Batches) -> Iterator[Step]:
    """Trains from the trainer's position to the end of the run."""
    while trainer.step < trainer.options.max_train_steps:
        started = time.perf_counter()
        rate = trainer.scheduler.get_last_lr()[0]
        loss = _accumulate(trainer, batches)
        norm = _update(trainer)
        trainer.step += 1
        if trainer.accelerator.num_processes > 1:
            loss = trainer.accelerator.reduce(loss, reduction="mean")
        value = loss.item()
        if not (abs(value) < float("inf")):
            raise FloatingPointError(
                f"the loss of step {trainer.step} is {value}; lower --learning_rate (now {rate:g}) "
                "or use --mixed_precision no"
            )
        yield Step(trainer.step, value, rate, norm, trainer.batch_size, time.perf_counter() - started)


def positions(trainer: Trainer, microstep: int) -> Sequence[int]:
    """This process's samples: the processes' microbatches lie side by side in the stream, so 2 equal 1."""
    size, world = trainer.options.train_batch_size, trainer.accelerator.num_processes
    microbatch = trainer.step * trainer.options.gradient_accumulation_steps + microstep
    start = (microbatch * world + trainer.accelerator.process_index) * size
    return range(start, start + size)


def _accumulate(trainer: Trainer, batches: Batches) -> torch.Tensor:
    """All microsteps of a step; gradients are in place afterwards. Returns the mean loss of this process."""
    accelerator, microsteps = trainer.accelerator, trainer.options.gradient_accumulation_steps
    total = torch.zeros((), device=accelerator.device)
    for microstep in range(microsteps):
        batch = batches.batch(positions(trainer, microstep)).to(accelerator.device)
        key = ("dropout", trainer.options.seed, trainer.step, microstep, accelerator.process_index)
        trainer.adapter.set_dropout_seed(seed_from(key))
        last = microstep == microsteps - 1
        with nullcontext() if last else accelerator.no_sync(trainer.objective), attention(batch.latents):
            loss = trainer.objective(batch) / microsteps
            accelerator.backward(loss)
        total += loss.detach()
    return total


def _update(trainer: Trainer) -> float:
    norm = trainer.accelerator.clip_grad_norm_(trainer.adapter.parameters(), trainer.options.max_grad_norm)
    trainer.optimizer.step()
    trainer.scheduler.step()
    trainer.optimizer.zero_grad()
    return float(norm)


def attention(latents: torch.Tensor) -> AbstractContextManager:
    """Plain attention for few tokens on a CPU, where the fused kernel's backward is slower."""
    small = latents.shape[-2] * latents.shape[-1] <= SMALL_ATTENTION
    return sdpa_kernel(SDPBackend.MATH) if latents.device.type == "cpu" and small else nullcontext()
