"""The training loop, as a generator: `for step in train(...)` yields after every optimizer step.

What to do then (log, save, validate, stop) is the script's business and stands in the script.
"""

import math
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffadapt.adapters.adapter import Adapter
from diffadapt.common.keyed_random import seed_from
from diffadapt.common.precision import Precision
from diffadapt.data.batches import Batches
from diffadapt.training.ema import AdapterAverage
from diffadapt.training.gradient_checks import GradientWatch, check_precision, nonfinite_message
from diffadapt.training.objective import Objective
from diffadapt.training.optimizers import make_optimizer
from diffadapt.training.option_effects import SCHEDULE_OPTIONS, check_effects
from diffadapt.training.options import TrainOptions
from diffadapt.training.param_groups import rate_groups
from diffadapt.training.sharding import average_gradients, check_processes, shard

SMALL_ATTENTION = 256  # latent positions up to which plain attention beats the fused kernel on a CPU
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
    skipped: bool = False  # left out because its loss or gradient is not finite
    text_encoder_lr: float | None = None  # where the text encoders have a rate of their own


@dataclass
class Trainer:
    """Everything that changes while training, and the position in the run."""

    accelerator: Accelerator
    objective: torch.nn.Module  # as prepared by accelerate
    adapter: Adapter
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    options: TrainOptions
    average: AdapterAverage | None = None
    notes: dict[str, str] = field(default_factory=dict)  # of a script, kept in the adapter's file
    data: Mapping[str, object] = field(default_factory=dict)  # as `data_record` describes it
    run: str = field(default_factory=lambda: uuid.uuid4().hex)  # id of the run, in all its checkpoints
    precision: Precision | None = None  # why the accelerator's precision was chosen
    step: int = 0  # optimizer steps made
    position: int = 0  # of the next sample in the endless stream
    skipped: int = 0  # of them left out because a loss or gradient was not finite

    @property
    def batch_size(self) -> int:
        """Samples per optimizer step over all processes."""
        return (
            self.options.train_batch_size
            * self.options.gradient_accumulation_steps
            * self.accelerator.num_processes
        )


def prepare(accelerator: Accelerator, objective: Objective, options: TrainOptions) -> Trainer:
    """Optimizer, schedule, average and the wrapped objective, at step 0.

    Raises: TypeError for trained tensors of low precision, ValueError for an optimizer that cannot be made,
        and for settings that the schedule does not use.
    """
    check_effects(options, names=SCHEDULE_OPTIONS)
    adapter = objective.adapter
    check_precision(adapter)
    optimizer = make_optimizer(rate_groups(adapter, options.text_encoder_lr), options)
    scheduler = get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=warmup_steps(options),
        num_training_steps=options.max_train_steps,
        num_cycles=options.lr_num_cycles,
        power=options.lr_power,
    )
    if options.gradient_checkpointing:
        objective.denoiser.enable_gradient_checkpointing()  # non-reentrant in diffusers
    check_processes(accelerator, shard_base=options.shard_base)
    if options.shard_base:
        shard(objective.denoiser, adapter)
        wrapped = accelerator.prepare_model(objective, evaluation_mode=True)  # for its precision; no wrapper
        optimizer = accelerator.prepare(optimizer)
    else:
        wrapped, optimizer = accelerator.prepare(objective, optimizer)
    wrapped.train()
    objective.denoiser.eval()  # a base's own dropout would be randomness without a key
    average = AdapterAverage(adapter, options.ema_decay) if options.use_ema else None
    return Trainer(accelerator, wrapped, adapter, optimizer, scheduler, options, average)


def warmup_steps(options: TrainOptions) -> int:
    """Warm-up steps as used: a long warm-up would be the whole of a short run."""
    return min(options.lr_warmup_steps, int(WARMUP_SHARE * options.max_train_steps))


def train(trainer: Trainer, batches: Batches) -> Iterator[Step]:
    """Trains from the trainer's position to the end of the run.

    Raises: FloatingPointError when more steps than `--skip_nonfinite` have a loss or gradient that is not
        finite; ValueError for trained tensors that no gradient reaches.
    """
    watch = GradientWatch(trainer.adapter) if trainer.step == 0 else None
    while trainer.step < trainer.options.max_train_steps:
        started = time.perf_counter()
        rates = trainer.scheduler.get_last_lr()
        rate = rates[0]
        text_rate = None if trainer.options.text_encoder_lr is None else rates[-1]
        losses = _accumulate(trainer, batches)
        norm = _clip(trainer)
        loss = _mean_loss(trainer, losses)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not math.isfinite(loss) or not (finite or _scales(trainer)):
            _count_skipped(trainer, batches, losses.tolist(), norm)
        elif finite and watch is not None and not watch.is_done:
            watch.look(rate)
        _update(trainer, make_step=finite or _scales(trainer))
        trainer.step += 1
        trainer.position += trainer.batch_size
        seconds = time.perf_counter() - started
        yield Step(trainer.step, loss, rate, norm, trainer.batch_size, seconds, not finite, text_rate)


def positions(trainer: Trainer, microstep: int) -> Sequence[int]:
    """This process's samples: the processes' microbatches lie side by side in the stream, so 2 equal 1."""
    size, world = trainer.options.train_batch_size, trainer.accelerator.num_processes
    start = trainer.position + (microstep * world + trainer.accelerator.process_index) * size
    return range(start, start + size)


def _accumulate(trainer: Trainer, batches: Batches) -> torch.Tensor:
    """All microsteps of a step; gradients are in place afterwards. Returns this process's loss of each."""
    accelerator, microsteps = trainer.accelerator, trainer.options.gradient_accumulation_steps
    losses = []
    for microstep in range(microsteps):
        batch = batches.batch(positions(trainer, microstep)).to(accelerator.device)
        key = ("dropout", trainer.options.seed, trainer.step, microstep, accelerator.process_index)
        trainer.adapter.set_dropout_seed(seed_from(key))
        last = microstep == microsteps - 1
        if not last or trainer.step + 1 < trainer.options.max_train_steps:
            batches.read_ahead(positions(trainer, microstep + 1))
        with nullcontext() if last else accelerator.no_sync(trainer.objective), attention(batch.latents):
            loss = trainer.objective(batch)
            accelerator.backward(loss / microsteps)
        losses.append(loss.detach())
    if trainer.options.shard_base:
        average_gradients(accelerator, trainer.adapter)
    return torch.stack(losses)


def _mean_loss(trainer: Trainer, losses: torch.Tensor) -> float:
    """The mean over microsteps and processes."""
    loss = losses.mean()
    if trainer.accelerator.num_processes > 1:
        loss = trainer.accelerator.reduce(loss, reduction="mean")
    return loss.item()


def _clip(trainer: Trainer) -> float:
    """Scales the gradients down to the largest norm allowed; 0 allows any. Returns their norm before."""
    largest = trainer.options.max_grad_norm or math.inf
    return float(trainer.accelerator.clip_grad_norm_(trainer.adapter.parameters(), largest))


def _scales(trainer: Trainer) -> bool:
    """Whether gradients are scaled (fp16): the scaler leaves out steps by itself while it finds its scale."""
    return trainer.accelerator.scaler is not None


def _count_skipped(trainer: Trainer, batches: Batches, losses: Sequence[float], norm: float) -> None:
    """One more step that is left out; the same on every process, since loss and gradient are shared."""
    trainer.skipped += 1
    tolerated = trainer.options.skip_nonfinite
    if trainer.skipped > tolerated:
        names = [batches.names(positions(trainer, microstep)) for microstep in range(len(losses))]
        raise FloatingPointError(
            nonfinite_message(
                step=trainer.step + 1, losses=losses, norm=norm, names=names, tolerated=tolerated
            )
        )


def _update(trainer: Trainer, *, make_step: bool) -> None:
    if make_step:
        trainer.optimizer.step()
        if trainer.average is not None:
            trainer.average.update()
    trainer.scheduler.step()
    trainer.optimizer.zero_grad()


def attention(latents: torch.Tensor) -> AbstractContextManager:
    """Plain attention for few tokens on a CPU, where the fused kernel's backward is slower."""
    small = latents.shape[-2] * latents.shape[-1] <= SMALL_ATTENTION
    return sdpa_kernel(SDPBackend.MATH) if latents.device.type == "cpu" and small else nullcontext()
