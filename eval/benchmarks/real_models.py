"""The DreamBooth script at the size of real models, beside diffusers' own loop: docs/real_models.md.

    python eval/benchmarks/real_models.py --output docs/real_models.md
    python eval/benchmarks/real_models.py --settings sd15-bf16 --methods flora --steps 3

Weights are random (made once, under --bases), so no picture means anything. Every run is a process of its
own, in turns, round after round; a run's first step is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from real_bases import real_base
from real_models_page import page

import diffadapt as da

ROOT = Path(__file__).parents[2]
RANK = 4  # the default of diffusers' script
RIVALS = {"diffusers' loop": [], "diffusers' loop, encoded once": ["--encode_once"]}


@dataclass(frozen=True)
class Setting:
    """One table: a base at a precision, and the side of its pictures."""

    title: str
    base: str
    dtype: torch.dtype
    resolution: int
    rivals: tuple[str, ...] = tuple(RIVALS)

    @property
    def precision(self) -> str:
        return "bf16" if self.dtype == torch.bfloat16 else "no"


SETTINGS = {
    "sd15-fp32": Setting("Stable Diffusion 1.5, float32, 256 px", "sd15", torch.float32, 256),
    "sd15-bf16": Setting("Stable Diffusion 1.5, bfloat16, 256 px", "sd15", torch.bfloat16, 256),
    "sdxl-bf16": Setting("Stable Diffusion XL, bfloat16, 512 px", "sdxl", torch.bfloat16, 512, rivals=()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--methods", nargs="+", default=["lora", "flora", "liera"])
    parser.add_argument("--steps", type=int, default=5, help="of each run; the first is not counted")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--bases", type=Path, default=Path("runs/real_bases"), help="where bases are kept")
    parser.add_argument("--records", type=Path, default=Path("runs/real_models.json"), help="finished tables")
    parser.add_argument("--output", type=Path, help="where to write the page")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        raise SystemExit("error: --steps must be at least 2: the first is not counted")
    records = json.loads(arguments.records.read_text(encoding="utf-8")) if arguments.records.exists() else {}
    for name in arguments.settings:
        records[name] = measure(SETTINGS[name], arguments)
        arguments.records.parent.mkdir(parents=True, exist_ok=True)
        arguments.records.write_text(json.dumps(records, indent=1), encoding="utf-8")
    text = page({SETTINGS[name].title: records[name] for name in SETTINGS if name in records}, rank=RANK)
    print(text) if arguments.output is None else arguments.output.write_text(text, encoding="utf-8")


def measure(setting: Setting, arguments: argparse.Namespace) -> dict[str, dict]:
    """Row -> seconds of its counted steps, the largest peak memory, and what was trained."""
    base = real_base(setting.base, setting.dtype, arguments.bases)
    rows = {name: {"seconds": [], "peak": 0} for name in (*arguments.methods, *setting.rivals)}
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
        out = Path(folder)
        command = [sys.executable, *command_of(name, setting, out)]
        for option, value in shared_options(setting, base, steps).items():
            command += [f"--{option}", str(value)]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        record = json.loads((out / "run.json").read_text(encoding="utf-8"))
        if name in RIVALS:
            return record["seconds"], record["peak_memory_bytes"]
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        return [line["seconds"] for line in lines if "seconds" in line], record["peak_memory_bytes"]


def shared_options(setting: Setting, base: Path, steps: int) -> dict[str, object]:
    """What our script and the loop are told alike."""
    return {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": da.embedded("subjects/cat"),
        "instance_prompt": "a photo of sks cat",
        "resolution": setting.resolution,
        "max_train_steps": steps,
        "mixed_precision": setting.precision,
    }


def command_of(name: str, setting: Setting, out: Path) -> list[str]:
    """The script of a row, and the options that only this one has; both leave ``out``/run.json."""
    if name in RIVALS:
        loop = str(ROOT / "eval" / "diffusers_loop.py")
        return [loop, *RIVALS[name], "--rank", str(RANK), "--output", str(out / "run.json")]
    ours = {
        "adapter": f"{name}(rank={RANK})",
        "targets": "attention",
        "train_batch_size": 1,
        "num_validation_images": 0,
        "export_formats": "none",
        "base_precision": "bf16" if setting.precision == "bf16" else "fp32",
        "output_dir": out,
    }
    options = [str(part) for option, value in ours.items() for part in (f"--{option}", value)]
    return [str(ROOT / "train_scripts" / "dreambooth.py"), "--center_crop", *options]


if __name__ == "__main__":
    main()
