"""What a person reads: a summary before the first step, figures after the last."""

import shlex
from collections.abc import Mapping

import torch
from diffusers import DiffusionPipeline

from diffadapt.adapters.adapter import Adapter
from diffadapt.data.batches import Batches
from diffadapt.models.base_names import is_embedded
from diffadapt.training.loop import TrainState, warmup_steps
from diffadapt.training.memory import estimate_memory, size_text
from diffadapt.training.options import TrainOptions


def summary_text(
    train_state: TrainState, batches: Batches, pipe: DiffusionPipeline, told: Mapping[str, str] | None = None
) -> str:
    """What is trained, on what, how long, and the memory it needs.

    Args:
        told: further rows of a script's report.
    """
    options, adapter = train_state.options, train_state.adapter
    base_parameters = train_state.accelerator.unwrap_model(train_state.objective).denoiser.num_parameters()
    rate = train_state.optimizer.param_groups[0]["initial_lr"]
    factors = (
        options.train_batch_size,
        options.gradient_accumulation_steps,
        train_state.accelerator.num_processes,
    )
    batch = f"{train_state.batch_size} a step: {{}} x accumulation {{}} x processes {{}}".format(*factors)
    rates = f"{rate:g}"
    if options.text_encoder_lr is not None:
        rates += f", of the text encoders {options.text_encoder_lr:g}"
    schedule = f"{options.optimizer}, {options.lr_scheduler}"
    schedule += f", warm-up {warmup_steps(options)}" if options.lr_warmup_steps else ""
    schedule += f", moving average {options.ema_decay:g}" if options.use_ema else ""
    rows = {
        "base": f"{options.pretrained_model_name_or_path}, {base_parameters / 1e6:.1f} M parameters, frozen",
        "adapter": _adapter(adapter, base_parameters),
        "data": batches.description,
        **(told or {}),
        "batch": batch,
        "steps": f"{options.max_train_steps}, rate {rates} ({schedule}), seed {options.seed}",
        "memory": str(estimate_memory(train_state, batches, pipe)),
        "machine": _machine(train_state),
        "output": options.output_dir,
    }
    lines = [f"{name:<8} " + text.replace("\n", "\n" + " " * 11) for name, text in rows.items()]
    return "\n".join(f"  {line}" for line in lines)


def figure_rows(figures: dict[str, dict[str, float]]) -> list[tuple[str, str, str]]:
    """(name, before, after) of every figure, as text; what was not measured is empty."""
    return [
        (name, *(f"{values[when]:.3f}" if when in values else "" for when in ("before", "after")))
        for name, values in figures.items()
    ]


def figures_table(figures: dict[str, dict[str, float]]) -> str:
    """The figures of a run, one a line."""
    rows = [("", "before", "after"), *figure_rows(figures)]
    return "\n".join(f"  {name:<44} {before:>8} {after:>8}" for name, before, after in rows)


def closing_message(
    options: TrainOptions, figures: dict[str, dict[str, float]], *, seconds: float, draw: str, further: str
) -> str:
    """Figures, where to look, and what to do next.

    Args:
        draw: options of `diffadapt sample` that say what to draw.
        further: shown after the demonstration: the command for own data.
    """
    output, base = options.output_dir, options.pretrained_model_name_or_path
    demo = ": DEMO on an embedded base" if is_embedded(base) else ""
    lines = [f"done in {seconds:.0f} s{demo}"]
    if figures:
        lines.append(figures_table(figures))
    elif options.num_validation_images:
        lines.append("  no figures: name a CLIP model with --extractor to get them")
    if options.num_validation_images:
        lines.append(f"look at  {output}/grid.png   (pictures: {output}/samples, figures: {output}/run.json)")
    adapter = shlex.quote(f"{output}/adapter.safetensors")
    more = shlex.quote(f"{output}/more")
    lines += [
        "draw more:",
        f"  diffadapt sample --adapter {adapter} {draw} --num_images 16 --out {more}",
    ]
    if is_embedded(base):
        lines += ["your own pictures, on a real base:", f"  {further}"]
    return "\n".join(lines)


def _machine(train_state: TrainState) -> str:
    """Device, threads of a CPU, and the precision with the reason for it."""
    device = train_state.accelerator.device
    threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    precision = train_state.precision or train_state.options.mixed_precision
    return f"{device}{threads}, mixed precision: {precision}"


def _adapter(adapter: Adapter, base_parameters: int) -> str:
    count = adapter.num_parameters
    stored = sum(p.numel() * p.element_size() for p in adapter.parameters())
    return (
        f"{adapter.method} on {len(adapter.sites)} layers: {count:,} parameters "
        f"({100 * count / base_parameters:.2f} %), {size_text(stored)}"
    )
