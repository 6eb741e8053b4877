"""What adapters cost to train, beside the bare model, PEFT, LyCORIS and plain autograd: docs/cost.md.

    python eval/benchmarks/cost.py --output docs/cost.md                        # every table
    python eval/benchmarks/cost.py --tables conv --repeats 7 --output docs/cost.md

Everything in a table is measured in turns in one process, round after round; ratios are taken within a round,
and the median over rounds is shown. Finished tables are kept in --records, and the page holds them all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cost_attach
import cost_measure
import cost_models
import cost_page
import cost_rivals
import torch

import diffadapt as da
from diffadapt.adapters.targets import find_sites

RANK = 16
EVERY = (
    *(name for name in da.METHODS if name != "class_embedding"),  # the bases have none
    "dora(recompute=true)",
    "liera(order=exp)",
    "mora(type=6)",
    "superlora(reshape=false)",
    "superlora(groups=8,projection=linear,rho=0.1)",
)
CONV = ("lora", "flora", "1lora", "dora", "liera")
SUBSET = (*CONV, "loha", "lokr")
NAIVE = ("liera", "liera(order=exp)", "superlora")  # also tried in plain autograd


@dataclass(frozen=True)
class Table:
    """One table: on which base and at which layers, and which methods beside the floor and PEFT's LoRA."""

    title: str
    base: str
    targets: str
    methods: Sequence[str]
    batch: int = 1
    dtype: str = "float32"
    rivals: tuple[str, ...] = ("peft", "lycoris", "naive")  # whose versions of the same methods

    def variants(self, methods: Sequence[str] | None = None) -> list[str]:
        """What is measured, of all methods or of some, each beside its rivals."""
        found = ["floor", "peft:lora"]
        for name in self.methods if methods is None else methods:
            found.append(f"diffadapt:{name}")
            rivals = (*cost_page.RIVALS.get(found[-1], ()), *[f"naive:{name}"] * (name in NAIVE))
            found += [rival for rival in rivals if rival.partition(":")[0] in self.rivals]
        return [*found, "merged:lora"]


_SD, _SMALL = "Stable Diffusion 1.5", "The embedded base"
TABLES = {
    "attention": Table(
        f"{_SD}, attention, batch 1",
        "sd15",
        "attention",
        [name for name in EVERY if name != "pissa"],  # 128 singular value decompositions: minutes
        rivals=("peft", "naive"),
    ),
    "conv": Table(f"{_SD}, convolutions, batch 1", "sd15", "conv", CONV),
    "batch4": Table(f"{_SD}, attention, batch 4", "sd15", "attention", SUBSET[:5], 4),
    "bf16": Table(f"{_SD} in bfloat16, attention, batch 1", "sd15", "attention", CONV, 1, "bfloat16", ()),
    "embedded": Table(f"{_SMALL}, attention, batch 16", "embedded", "attention", EVERY, 16),
    "embedded-conv": Table(f"{_SMALL}, convolutions, batch 16", "embedded", "conv", SUBSET, 16),
    "tiny": Table("A tiny UNet, attention, batch 2: to try the script", "tiny", "attention", SUBSET, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = [*TABLES, "attach"]
    parser.add_argument("--tables", nargs="+", choices=choices, default=[t for t in choices if t != "tiny"])
    parser.add_argument("--repeats", type=int, default=5, help="rounds; 0 counts operators and times nothing")
    parser.add_argument("--methods", nargs="+", help="only these; default: the table's own")
    parser.add_argument("--minutes", type=float, default=60, help="start no further round of a table after")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--records", type=Path, default=Path("runs/cost.json"), help="finished tables")
    parser.add_argument("--output", type=Path, help="where to write the page")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    records = json.loads(arguments.records.read_text(encoding="utf-8")) if arguments.records.exists() else {}
    for name in arguments.tables:
        print(f"== {name}", file=sys.stderr, flush=True)
        if name == "attach":
            records[name] = cost_attach.measure(arguments.repeats)
        else:
            variants = TABLES[name].variants(arguments.methods)
            records[name] = measure(TABLES[name], variants, arguments.repeats, minutes=arguments.minutes)
        records[name]["machine"] = cost_page.machine(arguments.threads)
        records[name]["versions"] = cost_page.versions()
        arguments.records.parent.mkdir(parents=True, exist_ok=True)
        arguments.records.write_text(json.dumps(records, indent=1), encoding="utf-8")
    text = cost_page.page([(name, records[name]) for name in choices if name in records])
    if arguments.output is None:
        print(text)
    else:
        arguments.output.write_text(text, encoding="utf-8")


def measure(table: Table, variants: Sequence[str], repeats: int, *, minutes: float = 60) -> dict:
    """The table's title, base parameters and, for every variant, its counts and timings."""
    base = cost_models.build(table.base, getattr(torch, table.dtype))
    inputs = cost_models.inputs(base, table.base, table.batch)
    rows, models, failed = {}, {}, {}
    for variant in variants:
        try:
            model = cost_rivals.make(base, variant, table.targets, RANK)
            counts = cost_measure.count_step(model, base, inputs.loss)
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
            timing = cost_measure.time_step(model, inputs.loss)
            rows[variant]["timings"].append(asdict(timing))
    sites, parameters = len(find_sites(base, table.targets)), sum(p.numel() for p in base.parameters())
    facts = {"title": table.title, "sites": sites, "base": parameters, "rank": RANK}
    return {**facts, "rows": rows, "failed": failed}


if __name__ == "__main__":
    main()
