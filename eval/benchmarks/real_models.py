"""Measures the DreamBooth script on models of real size, beside diffusers' own loop: docs/real_models.md.

    python eval/benchmarks/real_models.py --output docs/real_models.md
    python eval/benchmarks/real_models.py --settings sd15-bf16 --methods flora --steps 3

Weights are random (made once, under --bases), so the images mean nothing. Every run is a process of its own,
in turns, round after round; a run's first step is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from real_bases import real_base

import diffadapt as da

TRAIN_SCRIPT = Path(__file__).parents[2] / "train_scripts" / "dreambooth.py"
DIFFUSERS_LOOP = Path(__file__).with_name("diffusers_loop.py")
RANK = 4  # the default of diffusers' script
DIFFUSERS_ROWS = {  # row -> options of diffusers_loop.py
    "diffusers' loop": [],
    "diffusers' loop, encoded once": ["--encode_once"],
}
REFERENCE_ROW = "diffusers' loop, encoded once"  # ratios are relative to it
INTRODUCTION = """# Real models on a CPU: the DreamBooth script beside diffusers' own loop

Made by `python eval/benchmarks/real_models.py --output docs/real_models.md`. Weights are random: time and
memory do not depend on them. Batch 1, rank {rank}, attention of the denoiser, AdamW. Every run is a process
of its own, in turns; times are medians over the steps without the first of each run; memory is the peak
resident memory of the whole process.

- diffusers' loop: `train_dreambooth_lora.py` restated (eval/benchmarks/diffusers_loop.py), which encodes
  images and prompt in every step. Ratios are against the same loop with both encoded once, as our scripts do.
- In bfloat16 the base is kept in bfloat16 (`--base_precision bf16`); trained parameters are float32.
- Our scripts keep the autoencoder in float32, since SDXL's overflows in half precision; diffusers' loop keeps
  it in the base's precision. In bfloat16 that is 0.16 GiB of the difference in memory."""


@dataclass(frozen=True)
class Setting:
    """One table of the page.

    Attributes:
        title: heading.
        base: a name of `real_bases.real_base`.
        dtype: of the base.
        resolution: height and width of the images, in pixels.
        rivals: keys of DIFFUSERS_ROWS.
    """

    title: str
    base: str
    dtype: torch.dtype
    resolution: int
    rivals: tuple[str, ...] = tuple(DIFFUSERS_ROWS)

    @property
    def mixed_precision(self) -> str:
        return "bf16" if self.dtype == torch.bfloat16 else "no"


SETTINGS = {
    "sd15-fp32": Setting("Stable Diffusion 1.5, float32, 256 px", "sd15", torch.float32, 256),
    "sd15-bf16": Setting("Stable Diffusion 1.5, bfloat16, 256 px", "sd15", torch.bfloat16, 256),
    "sdxl-bf16": Setting("Stable Diffusion XL, bfloat16, 512 px", "sdxl", torch.bfloat16, 512, rivals=()),
}


def main() -> None:
    """Measures the settings and writes the page."""
    arguments = _parser().parse_args()
    if arguments.steps < 2:
        raise SystemExit("error: --steps must be at least 2: the first is not counted")
    records = {}
    if arguments.records.exists():
        records = json.loads(arguments.records.read_text(encoding="utf-8"))
    for name in arguments.settings:
        records[name] = measure(SETTINGS[name], arguments)
        arguments.records.parent.mkdir(parents=True, exist_ok=True)
        arguments.records.write_text(json.dumps(records, indent=1), encoding="utf-8")
    text = page({setting.title: records[name] for name, setting in SETTINGS.items() if name in records})
    if arguments.output is None:
        print(text)
    else:
        arguments.output.write_text(text, encoding="utf-8")


def measure(setting: Setting, arguments: argparse.Namespace) -> dict[str, dict]:
    """Row -> seconds of its counted steps, and the largest peak memory in bytes."""
    base = real_base(setting.base, setting.dtype, arguments.bases)
    rows: dict[str, dict] = {
        name: {"seconds": [], "peak": 0} for name in (*arguments.methods, *setting.rivals)
    }
    for _ in range(arguments.rounds):
        for name, row in rows.items():
            seconds, peak = run(name, setting, base, arguments.steps)
            row["seconds"] += seconds[1:]
            row["peak"] = max(row["peak"], peak)
            print(f"{setting.title}, {name}: {seconds}, {peak / 2**30:.2f} GiB", file=sys.stderr, flush=True)
    return rows


def run(name: str, setting: Setting, base: Path, steps: int) -> tuple[list[float], int]:
    """Seconds of every step of one run, and its peak memory in bytes."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        command = [sys.executable, *row_command(name, setting, output)]
        for option, value in shared_options(setting, base, steps).items():
            command += [f"--{option}", str(value)]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        record = json.loads((output / "run.json").read_text(encoding="utf-8"))
        if name in DIFFUSERS_ROWS:
            return record["seconds"], record["peak_memory_bytes"]
        seconds = []
        for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if "seconds" in entry:
                seconds.append(entry["seconds"])
        return seconds, record["peak_memory_bytes"]


def shared_options(setting: Setting, base: Path, steps: int) -> dict[str, object]:
    """The options that our script and diffusers' loop have in common."""
    return {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": da.embedded("subjects/cat"),
        "instance_prompt": "a photo of sks cat",
        "resolution": setting.resolution,
        "max_train_steps": steps,
        "mixed_precision": setting.mixed_precision,
    }


def row_command(name: str, setting: Setting, output: Path) -> list[str]:
    """The script of a row and its own options; both scripts write `output`/run.json."""
    if name in DIFFUSERS_ROWS:
        run_file = str(output / "run.json")
        return [str(DIFFUSERS_LOOP), *DIFFUSERS_ROWS[name], "--rank", str(RANK), "--output", run_file]
    options = {
        "adapter": f"{name}(rank={RANK})",
        "targets": "attention",
        "train_batch_size": 1,
        "num_validation_images": 0,
        "export_formats": "none",
        "base_precision": "bf16" if setting.mixed_precision == "bf16" else "fp32",
        "output_dir": output,
    }
    command = [str(TRAIN_SCRIPT), "--center_crop"]
    for option, value in options.items():
        command += [f"--{option}", str(value)]
    return command


def page(tables: Mapping[str, Mapping[str, dict]]) -> str:
    """The page.

    Args:
        tables: title -> row -> seconds of its steps and peak memory in bytes.
    """
    lines = [INTRODUCTION.format(rank=RANK)]
    for title, rows in tables.items():
        lines += ["", f"## {title}", "", "| | step, s | x diffusers | peak, GiB | x diffusers |"]
        lines.append("|---|---:|---:|---:|---:|")
        reference = rows.get(REFERENCE_ROW)
        for name, row in rows.items():
            label = name if name in DIFFUSERS_ROWS else f"**`{name}`**"
            step = statistics.median(row["seconds"])
            time_ratio = ""
            memory_ratio = ""
            if reference is not None:
                time_ratio = f"{step / statistics.median(reference['seconds']):.2f}"
                memory_ratio = f"{row['peak'] / reference['peak']:.2f}"
            peak = f"{row['peak'] / 2**30:.2f}"
            lines.append(f"| {label} | {step:.2f} | {time_ratio} | {peak} | {memory_ratio} |")
    lines += ["", f"Measured on {torch.get_num_threads()} CPU threads, torch {torch.__version__}."]
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="tables (default: all)")
    methods = ["lora", "flora", "liera"]
    add("--methods", nargs="+", default=methods, help=f"rows (default: {' '.join(methods)})")
    add("--steps", type=int, default=5, help="steps of each run; the first is not counted (default: 5)")
    add("--rounds", type=int, default=2, help="runs of each row (default: 2)")
    add("--bases", type=Path, default=Path("runs/real_bases"), help="folder for the bases")
    add("--records", type=Path, default=Path("runs/real_models.json"), help="file of finished tables")
    add("--output", type=Path, help="page to write (default: print it)")
    return parser


if __name__ == "__main__":
    main()
