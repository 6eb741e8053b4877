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
from diffadapt.data.batches import Batch, Batches
from diffadapt.training.ema import AdapterAverage
from diffadapt.training.gradient_checks import GradientFlowCheck, check_precision, nonfinite_message
from diffadapt.training.objective import Objective
from diffadapt.training.optimizers import make_optimizer
from diffadapt.training.option_checks import SCHEDULE_OPTIONS, check_effects
from diffadapt.training.options import TrainOptions
from diffadapt.training.param_groups import rate_groups
from diffadapt.training.sharding import average_gradients, check_processes, shard

SMALL_ATTENTION = 256  # positions or tokens up to which plain attention beats the fused kernel on a CPU
MAX_WARMUP_FRACTION = 0.1  # of the run


@dataclass(frozen=True)
class Step:
    """One finished optimizer step; a line of log.jsonl has the same names."""

    index: int  # 1 is the first
    loss: float  # mean over microsteps and processes
    lr: float  # learning rate of this step
    grad_norm: float  # before clipping
    images: int  # training images in it, over all processes
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
    metadata: dict[str, str] = field(default_factory=dict)  # of a script, for the adapter's file
    data: Mapping[str, object] = field(default_factory=dict)  # as `data_record` describes it
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)  # in all checkpoints of the run
    precision: Precision | None = None  # why the accelerator's precision was chosen
    step: int = 0  # optimizer steps made
    position: int = 0  # of the next sample in the endless stream
    skipped: int = 0  # steps left out because a loss or gradient was not finite

    @property
    def batch_size(self) -> int:
        """Samples per optimizer step over all processes."""
        return (
            self.options.train_batch_size
            * self.options.gradient_accumulation_steps
            * self.accelerator.num_processes
        )


def initial_state(accelerator: Accelerator, objective: Objective, options: TrainOptions) -> TrainState:
    """Builds optimizer, schedule and average, and wraps the objective, at step 0.

    Raises:
        TypeError: trained tensors have a low precision.
        ValueError: the optimizer cannot be made, or the schedule does not use some settings.
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
    has_only_shapes = next(objective.denoiser.parameters()).is_meta  # a dry run
    if options.shard_base and not has_only_shapes:
        shard(objective.denoiser, adapter)
        wrapped = accelerator.prepare_model(objective, evaluation_mode=True)  # for its precision; no wrapper
        optimizer = accelerator.prepare(optimizer)
    elif options.offload_blocks is not None or has_only_shapes:
        if not has_only_shapes:
            adapter.to(accelerator.device)
        # The denoiser is where its blocks are; no wrapper, which would want it on one device.
        wrapped = accelerator.prepare_model(objective, device_placement=False, evaluation_mode=True)
        optimizer = accelerator.prepare(optimizer)
    else:
        wrapped, optimizer = accelerator.prepare(objective, optimizer)
    wrapped.train()  # for the adapter's dropout
    objective.denoiser.eval()  # a base's own dropout would be randomness without a key
    average = AdapterAverage(adapter, options.ema_decay) if options.use_ema else None
    return TrainState(accelerator, wrapped, adapter, optimizer, scheduler, options, average)


def warmup_steps(options: TrainOptions) -> int:
    """Warm-up steps as used: a long warm-up would be the whole of a short run."""
    return min(options.lr_warmup_steps, int(MAX_WARMUP_FRACTION * options.max_train_steps))


def train(train_state: TrainState, batches: Batches) -> Iterator[Step]:
    """Trains from the current position to the end of the run.

    Raises:
        FloatingPointError: more steps than `--skip_nonfinite` have a loss or gradient that is not
            finite.
        ValueError: no gradient reaches some trained tensors.
    """
    options = train_state.options
    scales_gradients = train_state.accelerator.scaler is not None  # fp16
    # A resumed run passed this check when it began.
    flow_check = GradientFlowCheck(train_state.adapter) if train_state.step == 0 else None
    while train_state.step < options.max_train_steps:
        started = time.perf_counter()
        rates = train_state.scheduler.get_last_lr()  # of the denoiser first, of the text encoders last
        losses = _accumulate_gradients(train_state, batches)
        norm = _clip_gradients(train_state)
        loss = _mean_loss(train_state, losses)

        # While the fp16 scaler looks for its scale, gradients overflow; it leaves out these steps by itself.
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        is_fault = not math.isfinite(loss) or not (is_finite or scales_gradients)
        if is_fault:
            _count_skipped(train_state, batches, losses.tolist(), norm)
        elif is_finite and flow_check is not None and not flow_check.is_done:
            flow_check.check(rates[0])

        _update(train_state, make_step=is_finite or scales_gradients)
        train_state.step += 1
        train_state.position += train_state.batch_size
        yield Step(
            index=train_state.step,
            loss=loss,
            lr=rates[0],
            grad_norm=norm,
            images=train_state.batch_size,
            seconds=time.perf_counter() - started,
            skipped=not is_finite,
            text_encoder_lr=None if options.text_encoder_lr is None else rates[-1],
        )


def positions(train_state: TrainState, microstep: int) -> Sequence[int]:
    """The samples of this process in a microstep of the next step.

    The microbatches of N processes lie side by side in the stream that one process would read, so that N
    processes make the step of one process with N times the batch.
    """
    size = train_state.options.train_batch_size
    world = train_state.accelerator.num_processes
    start = train_state.position + (microstep * world + train_state.accelerator.process_index) * size
    return range(start, start + size)


def attention_kernel(batch: Batch) -> AbstractContextManager:
    """Plain attention over short sequences on a CPU, where the fused kernel's backward is slower.

    The text counts too: joint transformers attend to image and text at once, and most pad it to 512 tokens.
    """
    height, width = batch.latents.shape[-2:]
    lengths = [height * width]
    for value in batch.conditions.values():
        if value.dim() > 2:  # text states (B, L, D), not pooled text (B, D) or token ids (B, L)
            lengths.append(value.shape[1])
    if batch.latents.device.type == "cpu" and max(lengths) <= SMALL_ATTENTION:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _accumulate_gradients(train_state: TrainState, batches: Batches) -> torch.Tensor:
    """Runs all microsteps of a step, which leaves the gradients of their mean loss in place.

    Returns:
        This process's loss of each microstep, (microsteps,).
    """
    accelerator = train_state.accelerator
    options = train_state.options
    microsteps = options.gradient_accumulation_steps
    losses = []  # detached and left on the device: reading one would wait for the GPU
    for microstep in range(microsteps):
        batch = batches.batch(positions(train_state, microstep)).to(accelerator.device)
        # Dropout, like all randomness, is a function of the position: a resumed run repeats it.
        key = ("dropout", options.seed, train_state.step, microstep, accelerator.process_index)
        train_state.adapter.set_dropout_seed(seed_from(key))
        is_last = microstep == microsteps - 1
        if not is_last or train_state.step + 1 < options.max_train_steps:
            batches.read_ahead(positions(train_state, microstep + 1))
        # Processes exchange gradients in the last microstep only.
        synchronization = nullcontext() if is_last else accelerator.no_sync(train_state.objective)
        with synchronization, attention_kernel(batch):
            loss = train_state.objective(batch)
            accelerator.backward(loss / microsteps)
        losses.append(loss.detach())
    if options.shard_base or options.offload_blocks is not None:
        average_gradients(accelerator, train_state.adapter)
    return torch.stack(losses)


def _mean_loss(train_state: TrainState, losses: torch.Tensor) -> float:
    """The mean over microsteps and processes."""
    loss = losses.mean()
    if train_state.accelerator.num_processes > 1:
        loss = train_state.accelerator.reduce(loss, reduction="mean")
    return loss.item()


def _clip_gradients(train_state: TrainState) -> float:
    """Clips the global gradient norm to `--max_grad_norm` (0: no clipping); returns the norm before."""
    largest = train_state.options.max_grad_norm or math.inf
    return float(train_state.accelerator.clip_grad_norm_(train_state.adapter.parameters(), largest))


def _count_skipped(train_state: TrainState, batches: Batches, losses: Sequence[float], norm: float) -> None:
    """Counts a step that is left out; the same on every process, since loss and gradient are shared.

    Raises:
        FloatingPointError: there are more of them than `--skip_nonfinite`; the message names the images.
    """
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
    """One step of the optimizer and the average; the schedule goes on in any case."""
    if make_step:
        train_state.optimizer.step()
        if train_state.average is not None:
            train_state.average.update()
    train_state.scheduler.step()
    train_state.optimizer.zero_grad()
