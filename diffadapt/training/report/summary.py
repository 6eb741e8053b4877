"""Texts in the terminal: the summary before the first step, metrics and next commands after the last."""

import shlex
from collections.abc import Mapping

import torch

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.fingerprint import quantisation
from diffadapt.adapters.quantised_layers import count_base_parameters
from diffadapt.common.messages import shorten_list
from diffadapt.data.batches import Batches
from diffadapt.models.base import BaseModel
from diffadapt.training.loop import TrainState, warmup_steps
from diffadapt.training.memory import estimate_memory, size_text
from diffadapt.training.options import TrainOptions
from diffadapt.training.stage_memory import stage_memory

MetricValues = dict[str, dict[str, float]]  # name[extractor] -> {"before": ..., "after": ...}


def summary_text(
    train_state: TrainState,
    batches: Batches,
    model: BaseModel,
    more_rows: Mapping[str, str] | None = None,
) -> str:
    """The summary of a run: base, adapter, data, batch, steps, memory, machine and output folder.

    Args:
        more_rows: rows of a script's report.
    """
    options = train_state.options
    base_parameters = count_base_parameters(
        train_state.accelerator.unwrap_model(train_state.objective).denoiser
    )
    stored_as = quantisation(list(train_state.adapter.layer_states.values()))
    state = "frozen" if stored_as is None else f"frozen, quantised ({stored_as})"
    rows = {
        "base": f"{options.pretrained_model_name_or_path}, {base_parameters / 1e6:.1f} M parameters, {state}",
        "adapter": _adapter_text(train_state.adapter, base_parameters),
        "data": batches.description,
        **(more_rows or {}),
        "batch": (
            f"{train_state.batch_size} a step: {options.train_batch_size} x accumulation "
            f"{options.gradient_accumulation_steps} x processes {train_state.accelerator.num_processes}"
        ),
        "steps": _steps_text(train_state),
        "memory": _memory_text(train_state, batches, model),
        "machine": _machine_text(train_state),
        "output": options.output_dir,
    }
    lines = []
    for name, text in rows.items():
        indented = text.replace("\n", "\n" + " " * 11)  # below the text: two spaces, 8 for the name, one
        lines.append(f"  {name:<8} {indented}")
    return "\n".join(lines)


def metric_rows(values: MetricValues) -> list[tuple[str, str, str]]:
    """(name, before, after) of every metric, as text; what was not measured is empty."""
    rows = []
    for name, by_time in values.items():
        before = f"{by_time['before']:.3f}" if "before" in by_time else ""
        after = f"{by_time['after']:.3f}" if "after" in by_time else ""
        rows.append((name, before, after))
    return rows


def closing_message(
    options: TrainOptions,
    values: MetricValues,
    *,
    seconds: float,
    sample_options: str,
    own_data_command: str,
) -> str:
    """The metrics, where the results are, and commands to go on with.

    Args:
        seconds: how long the run took.
        sample_options: options of `diffadapt sample` that say what to generate.
        own_data_command: the command for own data, shown after the demonstration.
    """
    output = options.output_dir
    demo = ": DEMO on an embedded base" if options.is_demo else ""
    lines = [f"done in {seconds:.0f} s{demo}"]
    if values:
        for name, before, after in [("", "before", "after"), *metric_rows(values)]:
            lines.append(f"  {name:<44} {before:>8} {after:>8}")
    elif options.num_validation_images:
        lines.append("  no metrics: name a CLIP model with --extractor to get them")
    if options.num_validation_images:
        lines.append(f"look at  {output}/grid.png   (images: {output}/samples, metrics: {output}/run.json)")
    adapter = shlex.quote(f"{output}/adapter.safetensors")
    folder = shlex.quote(f"{output}/more")
    lines.append("generate more:")
    lines.append(f"  diffadapt sample --adapter {adapter} {sample_options} --num_images 16 --out {folder}")
    if options.is_demo:
        lines.append("your own images, on a real base:")
        lines.append(f"  {own_data_command}")
    return "\n".join(lines)


def _adapter_text(adapter: Adapter, base_parameters: int) -> str:
    """Method, layers, trained parameters and their share of the base, and bytes; layers without effect."""
    count = adapter.num_parameters
    stored_bytes = sum(p.numel() * p.element_size() for p in adapter.parameters())
    text = (
        f"{adapter.method} on {len(adapter.sites)} layers: {count:,} parameters "
        f"({100 * count / base_parameters:.2f} %), {size_text(stored_bytes)}"
    )
    if adapter.unread_layers:
        text += f"\nleft out, as no output depends on them: {shorten_list(adapter.unread_layers)}"
    return text


def _memory_text(train_state: TrainState, batches: Batches, model: BaseModel) -> str:
    """An estimate of memory; of the stages where the base has only shapes."""
    if model.has_weights:
        return str(estimate_memory(train_state, batches, model.pipe))
    options = train_state.options
    samples = batches.order.sample_indices(range(options.train_batch_size))  # and as many class images
    stages = stage_memory(
        model, train_state.adapter, options, resolution=options.resolution, batch_size=len(samples)
    )
    lines = []
    for stage in stages:
        lines.append(
            f"{stage.name:<15} {size_text(stage.total):>9}: models {size_text(stage.weights)}, activations "
            f"{size_text(stage.activations)}"
        )
    return "\n".join(lines)


def _steps_text(train_state: TrainState) -> str:
    """Number of steps, learning rates, optimizer, schedule and seed."""
    options = train_state.options
    rates = f"{train_state.optimizer.param_groups[0]['initial_lr']:g}"
    if options.text_encoder_lr is not None:
        rates += f", of the text encoders {options.text_encoder_lr:g}"
    schedule = f"{options.optimizer}, {options.lr_scheduler}"
    if options.lr_warmup_steps:
        schedule += f", warm-up {warmup_steps(options)}"
    if options.use_ema:
        schedule += f", moving average {options.ema_decay:g}"
    return f"{options.max_train_steps}, rate {rates} ({schedule}), seed {options.seed}"


def _machine_text(train_state: TrainState) -> str:
    """Device, threads of a CPU, and the precision with the reason for it."""
    device = train_state.accelerator.device
    threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    precision = train_state.precision or train_state.options.mixed_precision
    return f"{device}{threads}, mixed precision: {precision}"
