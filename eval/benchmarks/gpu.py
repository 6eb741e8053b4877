"""Measures what adapters cost on a GPU, beside PEFT, LyCORIS and the frozen model: docs/gpu.md.

    python eval/benchmarks/gpu.py --minutes 8 --output docs/gpu.md
    python eval/benchmarks/gpu.py --device cpu --rehearse --minutes 1  # tiny models, to try the script

Bases have random weights: time and memory do not depend on them. The most useful tables come first, every row
is written to --records as soon as it is measured, and no row is started after --minutes, so an interrupted
run keeps what it has measured. `--page_only` writes the page from the records.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import cost_models
import cost_page
import cost_rivals
import torch

from diffadapt.common import runtime
from diffadapt.common.atomic_files import write_atomically
from diffadapt.evaluation.features.extractors import load_extractor

ROOT = Path(__file__).parents[2]
RANK = 16
WARMUP = 3  # steps before anything is measured
ROUNDS = 3
FLOOR_AGAIN = "floor again"  # the frozen model, measured after all others
NO_TIME = "no time left"  # why a row was not measured
MAX_RECOMPILATIONS = 256  # blocks of each width are compiled separately
ALL_METHODS = (
    *("lora", "flora", "liera", "superlora", "1lora", "dora", "loha", "lokr", "vera", "mora", "full"),
    *("bitfit", "gamma", "norms", "difffit", "liera(order=exp)"),
    "superlora(groups=8,projection=linear,rho=0.1)",
)
MAIN_METHODS = ("lora", "flora", "liera", "superlora", "1lora", "dora")


@dataclass(frozen=True)
class Table:
    """One table of the page.

    Attributes:
        title: heading.
        base: a name of `cost_models.build`.
        targets: adapted layers.
        methods: measured beside the floor and PEFT's LoRA.
        dtype: of the base.
        batch: images of a step.
        size: height and width of the latents; images are eight times as large.
        checkpointing: whether blocks are recomputed in backward.
        compiled: whether transformer blocks are compiled with torch.compile.
        with_rivals: whether PEFT's and LyCORIS' versions of the same methods are measured too.
    """

    title: str
    base: str
    targets: str
    methods: tuple[str, ...]
    dtype: str = "bfloat16"
    batch: int = 1
    size: int = 64
    checkpointing: bool = False
    compiled: bool = False
    with_rivals: bool = False

    def variants(self) -> list[str]:
        """Rows in the order of measurement; the frozen model is measured twice, to show the noise."""
        rows = ["floor", "peft:lora"]
        for method in self.methods:
            variant = f"diffadapt:{method}"
            rows.append(variant)
            if self.with_rivals:
                rows += cost_page.RIVALS.get(variant, ())
        rows.append(FLOOR_AGAIN)
        return rows


SD = "Stable Diffusion 1.5, 512 px"
XL = "Stable Diffusion XL, 1,024 px"
TABLES = {
    "sd15-attention": Table(f"{SD}, attention", "sd15", "attention", ALL_METHODS, with_rivals=True),
    "sd15-conv": Table(
        f"{SD}, convolutions",
        "sd15",
        "conv",
        (*MAIN_METHODS[:3], "1lora", "dora", "loha", "lokr"),
        with_rivals=True,
    ),
    "sdxl-attention": Table(
        f"{XL}, attention, gradient checkpointing",
        "sdxl",
        "attention",
        MAIN_METHODS,
        size=128,
        checkpointing=True,
    ),
    "sd15-batch4": Table(f"{SD}, attention, batch 4", "sd15", "attention", MAIN_METHODS, batch=4),
    "sdxl-conv": Table(
        f"{XL}, convolutions, gradient checkpointing",
        "sdxl",
        "conv",
        MAIN_METHODS[:3],
        size=128,
        checkpointing=True,
    ),
    "sd15-fp16": Table(f"{SD}, attention", "sd15", "attention", MAIN_METHODS, dtype="float16"),
    "sdxl-attention-kept": Table(f"{XL}, attention", "sdxl", "attention", MAIN_METHODS[:2], size=128),
    "sd15-float32": Table(f"{SD}, attention", "sd15", "attention", MAIN_METHODS[:2], dtype="float32"),
    "sd15-compiled": Table(
        f"{SD}, attention, transformer blocks compiled", "sd15", "attention", MAIN_METHODS, compiled=True
    ),
}
EXTRACTORS = ("inception", "vgg16", "lpips:alex")
INTRODUCTION = """\
# What adapters cost on a GPU

Made by `python eval/benchmarks/gpu.py --minutes 8 --output docs/gpu.md`. Bases have random weights: time and
memory do not depend on them. Rank 16.

- step: forward and backward, in milliseconds, the median of three rounds. Latents and text states require
  gradients in every row, so that every row runs the whole backward. The **floor** is the frozen model; "floor
  again" is the same model measured after all others: their difference is noise.
- peak: the most memory allocated during a step, base included; rise: how much of it the step added.
- Bases in half precision run under autocast and trained parameters are float32, as with `--mixed_precision`.
- At a batch size of one, a fast GPU waits for the CPU that launches its kernels: times follow the number of
  operators more than their arithmetic, and differ from machine to machine. Memory does not.
"""
NEVER_RUN = "It has not been run on a GPU yet.\n"


def main() -> None:
    """Measures the parts and writes the page."""
    arguments = _parser().parse_args()
    records = {}
    if arguments.records.exists():
        records = json.loads(arguments.records.read_text(encoding="utf-8"))
    if not arguments.page_only:
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("error: no CUDA GPU; --device cpu --rehearse tries the script without one")
        measure(arguments, records)
    text = page(records)
    if arguments.output is None:
        print(text)
    else:
        arguments.output.write_text(text, encoding="utf-8")


def measure(arguments: argparse.Namespace, records: dict) -> None:
    """Measures the requested parts into `records`, which is written after every row."""
    warnings.filterwarnings("ignore")
    runtime.silence_libraries()
    deadline = time.monotonic() + 60 * arguments.minutes
    device = torch.device(arguments.device)
    records["machine"] = machine(device)

    def save() -> None:
        text = json.dumps(records, indent=1)
        arguments.records.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.records, lambda path: path.write_text(text, encoding="utf-8"))

    for name in arguments.parts:
        if time.monotonic() > deadline:
            print(f"{name}: no time left", file=sys.stderr, flush=True)
            continue
        print(f"== {name}", file=sys.stderr, flush=True)
        if name == "evaluation":
            records[name] = {}
            measure_extractors(device, records[name], save, deadline, count=2 if arguments.rehearse else 64)
        elif name == "demo":
            records[name] = demo_seconds(steps=2 if arguments.rehearse else None)
        else:
            table = shrink(TABLES[name]) if arguments.rehearse else TABLES[name]
            records[name] = {"title": table.title, "dtype": table.dtype, "rows": {}, "failed": {}}
            measure_table(table, device, records[name], save, deadline)
        save()


def shrink(table: Table) -> Table:
    """The same table on the tiny model, with two methods, in float32."""
    return dataclasses.replace(
        table,
        base="tiny",
        size=8,
        dtype="float32",
        methods=table.methods[:2],
        compiled=False,
        checkpointing=False,
    )


def measure_table(
    table: Table, device: torch.device, record: dict, save: Callable[[], None], deadline: float
) -> None:
    """Measures every row of a table into `record`, one after the other.

    Args:
        table: base, size and methods.
        device: where to run.
        record: gets `base`, `rows` and `failed`.
        save: writes all records to their file.
        deadline: of `time.monotonic`; no row is started later.
    """
    dtype = getattr(torch, table.dtype)
    base = cost_models.build(table.base, dtype, device)
    inputs = cost_models.inputs(base, table.base, table.batch, table.size)
    record["base"] = sum(parameter.numel() for parameter in base.parameters())
    for variant in table.variants():
        if time.monotonic() > deadline:
            record["failed"][variant] = NO_TIME
            continue
        try:
            record["rows"][variant] = measure_row(base, variant, table, inputs, device)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            record["failed"][variant] = f"{type(error).__name__}: {str(error)[:300]}"
        print(variant, record["rows"].get(variant) or record["failed"][variant], file=sys.stderr, flush=True)
        save()
        gc.collect()
        empty_cache(device)


def measure_row(
    base: torch.nn.Module, variant: str, table: Table, inputs: cost_models.Inputs, device: torch.device
) -> dict:
    """Seconds of a training step and of a forward without gradients, and peak memory of a step."""
    model = cost_rivals.make(base, "floor" if variant == FLOOR_AGAIN else variant, table.targets, RANK)
    model.train()
    if table.checkpointing:
        model.enable_gradient_checkpointing()
    if table.compiled:
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = MAX_RECOMPILATIONS
        torch._dynamo.config.accumulated_recompile_limit = 4 * MAX_RECOMPILATIONS
        model.compile_repeated_blocks()

    def step() -> None:
        with autocast(table, device):
            loss = inputs.loss(model)
        loss.backward()
        model.zero_grad(set_to_none=True)

    start = time.perf_counter()
    for _ in range(WARMUP):
        step()
    synchronize(device)
    warmup_seconds = time.perf_counter() - start
    allocated = reset_peak(device)
    step()
    peak = peak_memory(device)
    step_seconds = [timed(step, device) for _ in range(ROUNDS)]
    model.eval()
    with torch.no_grad(), autocast(table, device):
        inputs.loss(model)
        eval_seconds = [timed(lambda: inputs.loss(model), device) for _ in range(ROUNDS)]
    return {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "step_seconds": step_seconds,
        "eval_seconds": eval_seconds,
        "peak_bytes": peak,
        "rise_bytes": peak - allocated,
        "warmup_seconds": warmup_seconds,
    }


def measure_extractors(
    device: torch.device, record: dict, save: Callable[[], None], deadline: float, *, count: int
) -> None:
    """Measures the networks of the metrics on a batch of `count` 256-pixel images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 256, 256), generator=generator, dtype=torch.uint8)
    for name in EXTRACTORS:
        if time.monotonic() > deadline:
            return
        extractor = load_extractor(name, device=str(device), smoke=True)
        extractor(images)
        reset_peak(device)
        seconds = [timed(lambda extractor=extractor: extractor(images), device) for _ in range(ROUNDS)]
        record[name] = {"images": count, "seconds": seconds, "peak_bytes": peak_memory(device)}
        print(name, record[name], file=sys.stderr, flush=True)
        save()


def demo_seconds(steps: int | None) -> dict:
    """Seconds of README's first training command on this machine, imports and images included."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train_scripts" / "dreambooth.py"), "--adapter", "flora"]
        command += ["--output_dir", f"{folder}/run"]
        if steps is not None:
            command += ["--max_train_steps", str(steps), "--num_validation_images", "0"]
        start = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        seconds = time.perf_counter() - start
        if result.returncode != 0:
            return {"failed": result.stderr[-1000:]}
        record = json.loads(Path(folder, "run", "run.json").read_text(encoding="utf-8"))
    return {"seconds": seconds, "peak_bytes": record["peak_memory_bytes"], "images": steps is None}


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run: the mean of as many, at most 20, as fit into half a second."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    count = max(1, min(20, int(0.5 / (time.perf_counter() - start))))
    start = time.perf_counter()
    for _ in range(count):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / count


def autocast(table: Table, device: torch.device) -> AbstractContextManager:
    """Mixed precision as accelerate sets it, for bases in half precision."""
    if table.dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, table.dtype))


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def empty_cache(device: torch.device) -> None:
    """Frees cached memory of a GPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> int:
    """Resets the peak. Returns the bytes allocated now; 0 on a CPU, whose memory is not measured."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_memory(device: torch.device) -> int:
    """The most bytes allocated since `reset_peak`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def machine(device: torch.device) -> str:
    """The device and the versions that times depend on."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return f"{name}; {cost_page.versions()}"


def page(records: dict) -> str:
    """The page from the records."""
    if "machine" not in records:
        return INTRODUCTION + "\n" + NEVER_RUN
    lines = [INTRODUCTION, f"Measured on {records['machine']}.\n"]
    for name in TABLES:
        if records.get(name, {}).get("rows"):
            lines += table_lines(records[name])
    if records.get("evaluation"):
        lines += extractor_lines(records["evaluation"])
    demo = records.get("demo", {})
    if "seconds" in demo:
        lines += [
            "## The default run\n",
            "`train_scripts/dreambooth.py --adapter flora` on the embedded base: "
            f"{demo['seconds']:.0f} s with imports, images and figures.\n",
        ]
    return "\n".join(lines)


def table_lines(record: dict) -> list[str]:
    """A heading and a table with one line per row of the record."""
    rows = record["rows"]
    lines = [
        f"## {record['title']}, {record['dtype']}\n",
        f"{record['base']:,} parameters.\n",
        "| | trained | step, ms | x floor | x PEFT LoRA | forward x floor | peak, GiB | rise, MiB |",
        "|---|" + "---:|" * 7,
    ]
    for variant, row in rows.items():
        step = statistics.median(row["step_seconds"])
        cells = [
            f"{row['parameters']:,}",
            f"{1000 * step:.1f}",
            ratio_cell(rows, variant, "floor", "step_seconds"),
            ratio_cell(rows, variant, "peft:lora", "step_seconds"),
            ratio_cell(rows, variant, "floor", "eval_seconds"),
            f"{row['peak_bytes'] / 2**30:.2f}",
            f"{row['rise_bytes'] / 2**20:.0f}",
        ]
        lines.append(f"| {label(variant)} | {' | '.join(cells)} |")
    not_measured = [label(variant) for variant, reason in record["failed"].items() if reason == NO_TIME]
    if not_measured:
        lines.append(f"\nNot measured, as the time was over: {', '.join(not_measured)}.")
    for variant, reason in record["failed"].items():
        if reason != NO_TIME:
            lines.append(f"\n{label(variant)} failed: {reason}")
    return [*lines, ""]


def extractor_lines(record: dict) -> list[str]:
    """A table of the networks of the metrics."""
    lines = [
        "## Networks of the metrics\n",
        "256-pixel images, resizing included, random weights.\n",
        "| network | images in a batch | images per second | peak, GiB |",
        "|---|---:|---:|---:|",
    ]
    for name, row in record.items():
        rate = row["images"] / statistics.median(row["seconds"])
        lines.append(f"| {name} | {row['images']} | {rate:,.0f} | {row['peak_bytes'] / 2**30:.2f} |")
    return [*lines, ""]


def label(variant: str) -> str:
    """The name of a row on the page."""
    return variant if variant == FLOOR_AGAIN else cost_page.label(variant)


def ratio_cell(rows: dict, variant: str, against: str, field: str) -> str:
    """The time of a row relative to another; empty where the other is missing."""
    if against not in rows:
        return ""
    ratio = statistics.median(rows[variant][field]) / statistics.median(rows[against][field])
    return f"{ratio:.2f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    parts = [*TABLES, "evaluation", "demo"]
    add("--parts", nargs="+", choices=parts, default=parts, help="what to measure (default: everything)")
    add("--minutes", type=float, default=8, help="start no further row after (default: 8)")
    add("--device", default="cuda", help="default: cuda")
    add("--rehearse", action="store_true", help="tiny models and few rows, to try the script")
    add("--records", type=Path, default=Path("runs/gpu.json"), help="file of finished rows")
    add("--page_only", action="store_true", help="write the page from the records")
    add("--output", type=Path, help="page to write (default: print it)")
    return parser


if __name__ == "__main__":
    main()
