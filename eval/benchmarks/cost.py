"""Measures what adapters cost to train beside the bare model, PEFT and LyCORIS: docs/cost.md.

    python eval/benchmarks/cost.py --output docs/cost.md                        # every table
    python eval/benchmarks/cost.py --tables conv --repeats 7 --output docs/cost.md

All rows of a table are measured in turns in one process, round after round; ratios are taken within a round,
and the median over rounds is shown. Finished tables are stored in --records, and the page holds them all.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cost_models
import cost_page
import cost_rivals
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import diffadapt as da
from diffadapt.adapters.targets import find_sites
from diffadapt.training.memory import kept_storages

Loss = Callable[[nn.Module], Tensor]  # runs a model on fixed inputs

RANK = 16
ALL_METHODS = (
    *(name for name in da.METHODS if name != "class_embedding"),  # the bases have no class embedding
    "dora(recompute=true)",
    "liera(order=exp)",
    "mora(type=6)",
    "superlora(reshape=false)",
    "superlora(groups=8,projection=linear,rho=0.1)",
)
CONV_METHODS = ("lora", "flora", "1lora", "dora", "liera")
MAIN_METHODS = (*CONV_METHODS, "loha", "lokr")
IN_PLAIN_AUTOGRAD = ("liera", "liera(order=exp)", "superlora")  # also measured so
STACK_LAYERS = 500  # linear layers of the smallest stack that is attached, saved and loaded


@dataclass(frozen=True)
class Table:
    """One table of the page.

    Attributes:
        title: heading.
        base: a name of `cost_models.build`.
        targets: adapted layers.
        methods: measured beside the floor and PEFT's LoRA.
        batch: images of a step.
        dtype: of the base.
        rivals: programs whose versions of the same methods are measured too.
    """

    title: str
    base: str
    targets: str
    methods: Sequence[str]
    batch: int = 1
    dtype: str = "float32"
    rivals: tuple[str, ...] = ("peft", "lycoris", "naive")

    def variants(self, methods: Sequence[str] | None = None) -> list[str]:
        """The rows: every method beside its rivals.

        Args:
            methods: only these; None: those of the table.
        """
        rows = ["floor", "peft:lora"]
        for method in self.methods if methods is None else methods:
            variant = f"diffadapt:{method}"
            rivals = list(cost_page.RIVALS.get(variant, ()))
            if method in IN_PLAIN_AUTOGRAD:
                rivals.append(f"naive:{method}")
            rows.append(variant)
            rows += [rival for rival in rivals if rival.partition(":")[0] in self.rivals]
        rows.append("merged:lora")
        return rows


SD15 = "Stable Diffusion 1.5"
EMBEDDED = "The embedded base"
TABLES = {
    "attention": Table(
        f"{SD15}, attention, batch 1",
        "sd15",
        "attention",
        [name for name in ALL_METHODS if name != "pissa"],  # 128 singular value decompositions: minutes
        rivals=("peft", "naive"),
    ),
    "conv": Table(f"{SD15}, convolutions, batch 1", "sd15", "conv", CONV_METHODS),
    "batch4": Table(f"{SD15}, attention, batch 4", "sd15", "attention", CONV_METHODS, batch=4),
    "bf16": Table(
        f"{SD15} in bfloat16, attention, batch 1",
        "sd15",
        "attention",
        CONV_METHODS,
        dtype="bfloat16",
        rivals=(),
    ),
    "embedded": Table(f"{EMBEDDED}, attention, batch 16", "embedded", "attention", ALL_METHODS, batch=16),
    "embedded-conv": Table(f"{EMBEDDED}, convolutions, batch 16", "embedded", "conv", MAIN_METHODS, batch=16),
    "tiny": Table(
        "A tiny UNet, attention, batch 2: to try the script", "tiny", "attention", MAIN_METHODS, batch=2
    ),
}


def main() -> None:
    """Measures the tables and writes the page."""
    arguments = _parser().parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    records = {}
    if arguments.records.exists():
        records = json.loads(arguments.records.read_text(encoding="utf-8"))
    for name in arguments.tables:
        print(f"== {name}", file=sys.stderr, flush=True)
        if name == "attach":
            record = measure_attaching(arguments.repeats)
        else:
            variants = TABLES[name].variants(arguments.methods)
            record = measure(TABLES[name], variants, arguments.repeats, minutes=arguments.minutes)
        record["machine"] = cost_page.machine(arguments.threads)
        record["versions"] = cost_page.versions()
        records[name] = record
        arguments.records.parent.mkdir(parents=True, exist_ok=True)
        arguments.records.write_text(json.dumps(records, indent=1), encoding="utf-8")
    text = cost_page.page([(name, records[name]) for name in (*TABLES, "attach") if name in records])
    if arguments.output is None:
        print(text)
    else:
        arguments.output.write_text(text, encoding="utf-8")


def measure(table: Table, variants: Sequence[str], repeats: int, *, minutes: float = 60) -> dict:
    """Measures a table.

    Args:
        table: base and layers.
        variants: the rows.
        repeats: rounds; 0 counts and times nothing.
        minutes: no round is started later.

    Returns:
        Title, base parameters and, for every variant, its counts and timings, or why it failed.
    """
    base = cost_models.build(table.base, getattr(torch, table.dtype))
    inputs = cost_models.inputs(base, table.base, table.batch)
    rows: dict[str, dict] = {}
    models: dict[str, nn.Module] = {}
    failed: dict[str, str] = {}
    for variant in variants:
        try:
            model = cost_rivals.make(base, variant, table.targets, RANK)
            counts = count_step(model, base, inputs.loss)
        except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
            failed[variant] = f"{type(error).__name__}: {error}"
            print(f"{variant} cannot be measured: {error}", file=sys.stderr, flush=True)
            continue
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows[variant] = {"parameters": trained, **asdict(counts), "timings": []}
        models[variant] = model
        print(f"{variant}: {rows[variant]}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    for _ in range(repeats):
        if time.perf_counter() - start > 60 * minutes:
            break
        for variant, model in models.items():
            rows[variant]["timings"].append(asdict(time_step(model, inputs.loss)))
    return {
        "title": table.title,
        "sites": len(find_sites(base, table.targets)),
        "base": sum(p.numel() for p in base.parameters()),
        "rank": RANK,
        "rows": rows,
        "failed": failed,
    }


# What a training step costs


@dataclass(frozen=True)
class Counts:
    """Costs that follow from the operators alone, the same on every machine.

    Attributes:
        kept_bytes: tensors kept between forward and backward, each storage once, without the base's weights.
        flops: floating-point operations of products and convolutions, forward and backward.
        operators: operators dispatched, forward and backward.
        launches: those of them that compute: neither views nor allocations. What a GPU would launch.
    """

    kept_bytes: int
    flops: int
    operators: int
    launches: int


@dataclass(frozen=True)
class Timing:
    """One training step and one forward without gradients.

    Attributes:
        step_seconds: forward and backward.
        eval_seconds: forward in eval mode.
        rise_bytes: how far the process' resident memory rose above its start during the step.
    """

    step_seconds: float
    eval_seconds: float
    rise_bytes: int


_ATEN = torch.ops.aten
_FREE = {  # operators that launch nothing, besides views
    _ATEN._unsafe_view,
    _ATEN.detach,
    _ATEN.empty,
    _ATEN.new_empty,
    _ATEN.empty_like,
    _ATEN.empty_strided,
}


def _addmm_flops(total: torch.Size, first: torch.Size, second: torch.Size, **_) -> int:
    return 2 * first[0] * first[1] * second[1]


_IN_PLACE = {_ATEN.addmm_: _addmm_flops}  # not counted by torch's flop counter


class _OperatorCounter(TorchDispatchMode):
    """Counts dispatched operators, and those that launch a kernel."""

    def __init__(self):
        super().__init__()
        self.operators = 0
        self.launches = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "aten":
            self.operators += 1
            self.launches += not operator.is_view and operator.overloadpacket not in _FREE
        return operator(*args, **(kwargs or {}))


def count_step(model: nn.Module, base: nn.Module, loss: Loss) -> Counts:
    """Runs one training step of `model`, whose frozen weights are those of `base`, and counts."""
    base_tensors = [*base.parameters(), *base.buffers()]
    with FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as flops, _OperatorCounter() as counter:
        with kept_storages(base_tensors) as kept:
            value = loss(model)
        kept_bytes = sum(storage.nbytes() for storage in kept.values())
        kept.clear()
        value.backward()
    model.zero_grad(set_to_none=True)
    return Counts(kept_bytes, flops.get_total_flops(), counter.operators, counter.launches)


def time_step(model: nn.Module, loss: Loss) -> Timing:
    """Runs one training step and one forward in eval mode."""
    model.train()
    memory_before = _reset_peak()
    start = time.perf_counter()
    loss(model).backward()
    step_seconds = time.perf_counter() - start
    rise_bytes = _process_memory("VmHWM") - memory_before
    model.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        start = time.perf_counter()
        loss(model)
        eval_seconds = time.perf_counter() - start
    model.train()
    return Timing(step_seconds, eval_seconds, rise_bytes)


def _reset_peak() -> int:
    """Gives freed memory back to the system, resets the peak, and returns the resident bytes (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _process_memory("VmRSS")


def _process_memory(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


# What attaching, saving and loading cost


def measure_attaching(repeats: int) -> dict:
    """Median seconds of attaching to SDXL's denoiser, and of attaching, saving and loading on stacks.

    The stacks have 1, 2 and 4 times STACK_LAYERS layers, to show how the times grow.
    """
    repeats = max(repeats, 1)
    model = cost_models.unfilled_sdxl()
    sdxl = {}
    for method in (da.LoRA(rank=16), da.FLoRA(rank=16)):
        for targets in ("attention", "attention+conv"):
            seconds = []
            for _ in range(repeats):
                start = time.perf_counter()
                adapter = da.attach(model, method, targets)
                seconds.append(time.perf_counter() - start)
                sites = len(adapter.sites)
                da.detach(adapter)
            sdxl[f"{method.name}, {targets}"] = {"seconds": statistics.median(seconds), "sites": sites}
    growth = {str(factor): _attach_save_load(factor * STACK_LAYERS, repeats) for factor in (1, 2, 4)}
    return {
        "title": "Attaching, saving and loading",
        "sdxl": sdxl,
        "growth": growth,
        "layers": STACK_LAYERS,
    }


def _attach_save_load(num_layers: int, repeats: int) -> dict[str, float]:
    """Median seconds of each step on a stack of linear layers."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(num_layers)))
    seconds: dict[str, list[float]] = {"attach": [], "save": [], "load": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "adapter.safetensors"
            start = time.perf_counter()
            adapter = da.attach(model, da.LoRA(rank=4), "linear")
            attached = time.perf_counter()
            da.save(adapter, file)
            saved = time.perf_counter()
            da.detach(adapter)
            before_load = time.perf_counter()
            adapter = da.load(model, file)
            loaded = time.perf_counter()
            da.detach(adapter)
            seconds["attach"].append(attached - start)
            seconds["save"].append(saved - attached)
            seconds["load"].append(loaded - before_load)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    choices = [*TABLES, "attach"]
    default = [name for name in choices if name != "tiny"]
    add(
        "--tables",
        nargs="+",
        choices=choices,
        default=default,
        help="tables to measure (default: all but tiny)",
    )
    add("--repeats", type=int, default=5, help="rounds; 0 counts operators and times nothing (default: 5)")
    add("--methods", nargs="+", help="only these methods (default: those of the table)")
    add("--minutes", type=float, default=60, help="start no further round of a table after (default: 60)")
    add("--threads", type=int, default=2, help="threads of torch (default: 2)")
    add("--records", type=Path, default=Path("runs/cost.json"), help="file of finished tables")
    add("--output", type=Path, help="page to write (default: print it)")
    return parser


if __name__ == "__main__":
    main()
