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
from diffadapt.training.gradient_checks import GradientFlowCheck, check_precision, nonfinite_message
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
class TrainState:
    """Everything that changes while training, and the position in the run."""

    accelerator: Accelerator
    objective: torch.nn.Module  # as prepared by accelerate
    adapter: Adapter
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    options: TrainOptions
    average: AdapterAverage | None = None
    metadata: dict[str, str] = field(default_factory=dict)  # of a script, kept in the adapter's file
    data: Mapping[str, object] = field(default_factory=dict)  # as `data_record` describes it
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)  # id of the run, in all its checkpoints
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


def initial_state(accelerator: Accelerator, objective: Objective, options: TrainOptions) -> TrainState:
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
    return TrainState(accelerator, wrapped, adapter, optimizer, scheduler, options, average)


def warmup_steps(options: TrainOptions) -> int:
    """Warm-up steps as used: a long warm-up would be the whole of a short run."""
    return min(options.lr_warmup_steps, int(WARMUP_SHARE * options.max_train_steps))


def train(train_state: TrainState, batches: Batches) -> Iterator[Step]:
    """Trains from the train_state's position to the end of the run.

    Raises: FloatingPointError when more steps than `--skip_nonfinite` have a loss or gradient that is not
        finite; ValueError for trained tensors that no gradient reaches.
    """
    watch = GradientFlowCheck(train_state.adapter) if train_state.step == 0 else None
    while train_state.step < train_state.options.max_train_steps:
        started = time.perf_counter()
        rates = train_state.scheduler.get_last_lr()
        rate = rates[0]
        text_rate = None if train_state.options.text_encoder_lr is None else rates[-1]
        losses = _accumulate(train_state, batches)
        norm = _clip(train_state)
        loss = _mean_loss(train_state, losses)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not math.isfinite(loss) or not (finite or _scales(train_state)):
            _count_skipped(train_state, batches, losses.tolist(), norm)
        elif finite and watch is not None and not watch.is_done:
            watch.look(rate)
        _update(train_state, make_step=finite or _scales(train_state))
        train_state.step += 1
        train_state.position += train_state.batch_size
        seconds = time.perf_counter() - started
        yield Step(train_state.step, loss, rate, norm, train_state.batch_size, seconds, not finite, text_rate)


def positions(train_state: TrainState, microstep: int) -> Sequence[int]:
    """This process's samples: the processes' microbatches lie side by side in the stream, so 2 equal 1."""
    size, world = train_state.options.train_batch_size, train_state.accelerator.num_processes
    start = train_state.position + (microstep * world + train_state.accelerator.process_index) * size
    return range(start, start + size)


def _accumulate(train_state: TrainState, batches: Batches) -> torch.Tensor:
    """All microsteps of a step; gradients are in place afterwards. Returns this process's loss of each."""
    accelerator, microsteps = train_state.accelerator, train_state.options.gradient_accumulation_steps
    losses = []
    for microstep in range(microsteps):
        batch = batches.batch(positions(train_state, microstep)).to(accelerator.device)
        key = ("dropout", train_state.options.seed, train_state.step, microstep, accelerator.process_index)
        train_state.adapter.set_dropout_seed(seed_from(key))
        last = microstep == microsteps - 1
        if not last or train_state.step + 1 < train_state.options.max_train_steps:
            batches.read_ahead(positions(train_state, microstep + 1))
        with nullcontext() if last else accelerator.no_sync(train_state.objective), attention(batch.latents):
            loss = train_state.objective(batch)
            accelerator.backward(loss / microsteps)
        losses.append(loss.detach())
    if train_state.options.shard_base:
        average_gradients(accelerator, train_state.adapter)
    return torch.stack(losses)


def _mean_loss(train_state: TrainState, losses: torch.Tensor) -> float:
    """The mean over microsteps and processes."""
    loss = losses.mean()
    if train_state.accelerator.num_processes > 1:
        loss = train_state.accelerator.reduce(loss, reduction="mean")
    return loss.item()


def _clip(train_state: TrainState) -> float:
    """Scales the gradients down to the largest norm allowed; 0 allows any. Returns their norm before."""
    largest = train_state.options.max_grad_norm or math.inf
    return float(train_state.accelerator.clip_grad_norm_(train_state.adapter.parameters(), largest))


def _scales(train_state: TrainState) -> bool:
    """Whether gradients are scaled (fp16): the scaler leaves out steps by itself while it finds its scale."""
    return train_state.accelerator.scaler is not None


def _count_skipped(train_state: TrainState, batches: Batches, losses: Sequence[float], norm: float) -> None:
    """One more step that is left out; the same on every process, since loss and gradient are shared."""
    train_state.skipped += 1
    tolerated = train_state.options.skip_nonfinite
    if train_state.skipped > tolerated:
        names = [batches.names(positions(train_state, microstep)) for microstep in range(len(losses))]
        raise FloatingPointError(
            nonfinite_message(
                step=train_state.step + 1, losses=losses, norm=norm, names=names, tolerated=tolerated
            )
        )


def _update(train_state: TrainState, *, make_step: bool) -> None:
    if make_step:
        train_state.optimizer.step()
        if train_state.average is not None:
            train_state.average.update()
    train_state.scheduler.step()
    train_state.optimizer.zero_grad()


def attention(latents: torch.Tensor) -> AbstractContextManager:
    """Plain attention for few tokens on a CPU, where the fused kernel's backward is slower."""
    small = latents.shape[-2] * latents.shape[-1] <= SMALL_ATTENTION
    return sdpa_kernel(SDPBackend.MATH) if latents.device.type == "cpu" and small else nullcontext()
