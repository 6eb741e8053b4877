"""The page of eval/benchmarks/real_models.py."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import torch

RIVAL = "diffusers' loop, encoded once"  # what ratios are taken against
INTRODUCTION = """# Real models on a CPU: the DreamBooth script beside diffusers' own loop

Made by `python eval/benchmarks/real_models.py --output docs/real_models.md`. Weights are random: time and
memory do not depend on them. Batch 1, rank {rank}, attention of the denoiser, AdamW; every run a process
of its own, in turns; median of the steps, the first of each run left out; peak resident memory of the whole
process.

- diffusers' loop: `train_dreambooth_lora.py` restated (eval/benchmarks/diffusers_loop.py), which
  encodes images and prompt in every step. Ratios are against the same loop with both encoded once, as our
  scripts do.
- In bfloat16 the base is kept in bfloat16 (`--base_precision bf16`); what is trained is float32.
- Our scripts hold the autoencoder in float32, since SDXL's overflows in half precision; the loop holds it in
  the base's precision. In bfloat16 that is 0.16 GiB of the difference in memory."""


def page(tables: Mapping[str, Mapping[str, dict]], *, rank: int) -> str:
    """Title -> row -> seconds and peak memory in bytes, as Markdown."""
    lines = [INTRODUCTION.format(rank=rank)]
    for title, rows in tables.items():
        rival = rows.get(RIVAL)
        lines += ["", f"## {title}", "", "| | step, s | x diffusers | peak, GiB | x diffusers |"]
        lines.append("|---|---:|---:|---:|---:|")
        for name, row in rows.items():
            step, peak = statistics.median(row["seconds"]), row["peak"]
            label = name if name.startswith("diffusers") else f"**`{name}`**"
            slower = f"{step / statistics.median(rival['seconds']):.2f}" if rival else ""
            larger = f"{peak / rival['peak']:.2f}" if rival else ""
            lines.append(f"| {label} | {step:.2f} | {slower} | {peak / 2**30:.2f} | {larger} |")
    lines += ["", f"Measured on {torch.get_num_threads()} CPU threads, torch {torch.__version__}."]
    return "\n".join(lines) + "\n"
