"""The page of costs: a table of every variant, one of each method beside its rivals, and the goals."""

from __future__ import annotations

import importlib.metadata
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

FIGURES = {  # figure -> what it is, in the goals
    "step": "step time",
    "kept": "kept for backward",
    "eval": "eval forward",
    "flops": "FLOPs",
    "operators": "operators",
    "launches": "launches",
}
RIVALS = {  # besides the same method through plain autograd
    "diffadapt:flora": ("lycoris:tucker-bypass", "lycoris:tucker"),
    "diffadapt:dora": ("peft:dora",),
    "diffadapt:liera": ("peft:hira",),
    "diffadapt:loha": ("peft:loha", "lycoris:loha"),
    "diffadapt:lokr": ("peft:lokr", "lycoris:lokr"),
    "diffadapt:vera": ("peft:vera",),
    "diffadapt:pissa": ("peft:pissa",),
}


@dataclass(frozen=True)
class Goal:
    """At most ``limit`` times what another variant costs; in the tables whose name begins with ``table``."""

    variant: str
    figure: str
    against: str
    limit: float
    table: str = ""


_LORA, _WEIGHT_SPACE = ("lora", "flora"), ("liera", "liera(order=exp)", "superlora")
GOALS = (
    *(Goal(f"diffadapt:{m}", "step", "peft:lora", 1.03) for m in _LORA),
    *(Goal(f"diffadapt:{m}", "kept", "peft:lora", 1.0, t) for t in ("attention", "batch4") for m in _LORA),
    *(Goal(f"diffadapt:{m}", "kept", "peft:lora", 1.05, "conv") for m in _LORA),
    *(Goal(f"diffadapt:{m}", f, "peft:lora", 1.0) for f in ("flops", "operators", "launches") for m in _LORA),
    Goal("diffadapt:flora", "step", "lycoris:tucker-bypass", 1.0),
    Goal("diffadapt:1lora", "step", "floor", 1.05),
    Goal("diffadapt:1lora", "kept", "floor", 1.01),
    Goal("diffadapt:dora", "step", "peft:lora", 1.25),
    *(Goal(f"diffadapt:{m}", "step", f"naive:{m}", 0.7) for m in _WEIGHT_SPACE),
    *(Goal(f"diffadapt:{m}", "step", "peft:hira", 0.7) for m in _WEIGHT_SPACE),
    *(Goal(f"diffadapt:{m}", "step", "peft:lora", 1.6, "batch4") for m in _WEIGHT_SPACE),
    *(Goal(f"diffadapt:{m}", "kept", "peft:lora", 1.05) for m in (*_WEIGHT_SPACE, "loha", "lokr")),
    Goal("diffadapt:loha", "step", "peft:lora", 1.5),
    Goal("diffadapt:lokr", "step", "peft:lora", 1.2),
    *(Goal(f"merged:{m}", f, "floor", 1.0) for f in ("step", "eval") for m in _LORA),
)
SLACK = {"step": 0.02, "eval": 0.02}  # what two runs of the same model differ by


def page(records: Sequence[tuple[str, dict]]) -> str:
    """The whole document from the finished tables."""
    lines = ["# What adapters cost", "", *_INTRODUCTION, ""]
    for name, record in records:
        lines += [f"## {record['title']}", ""]
        lines += _attaching(record) if name == "attach" else _table(name, record)
        lines += ["", f"Measured on {record['machine']}; {record['versions']}.", ""]
    return "\n".join([*lines, _REASONS])


def versions() -> str:
    packages = ("torch", "diffusers", "peft", "lycoris-lora")
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)


def label(variant: str) -> str:
    """What a variant is called on the page."""
    maker, _, name = variant.partition(":")
    forms = {
        "floor": "floor: frozen model",
        "peft": f"PEFT {name}",
        "lycoris": f"LyCORIS {name}",
        "naive": f"`{name}` in plain autograd",
        "merged": f"`{name}`, merged",
    }
    return forms.get(maker, f"**`{name}`**")


def ratio(rows: dict, variant: str, against: str, figure: str) -> float | None:
    """How many times as much a variant costs as another; None where either was not measured."""
    if variant not in rows or against not in rows:
        return None
    own, other = _values(rows[variant], figure), _values(rows[against], figure)
    pairs = [a / b for a, b in zip(own, other, strict=True) if b]
    return statistics.median(pairs) if pairs else None


def _values(row: dict, figure: str) -> list[float]:
    timed = {"step": "step_seconds", "eval": "eval_seconds", "peak": "rise_bytes"}
    if figure in timed:
        return [timing[timed[figure]] for timing in row["timings"]]
    return [row["kept_bytes" if figure == "kept" else figure]]


def _table(name: str, record: dict) -> list[str]:
    rows = record["rows"]
    rounds = max(len(row["timings"]) for row in rows.values())
    lines = [
        f"{record['base']:,} parameters, {record['sites']} adapted layers, rank {record['rank']}, "
        f"{rounds} rounds.",
        "",
        "| | trained | step, s | x floor | x PEFT LoRA | eval x floor | kept, MiB | x PEFT LoRA "
        "| peak x PEFT LoRA | GFLOP | x PEFT LoRA | operators | launches |",
        "|---|" + "---:|" * 12,
    ]
    for variant, row in rows.items():
        cells = [f"{row['parameters']:,}", _seconds(row)]
        cells += [_times(rows, variant, "floor", "step"), _times(rows, variant, "peft:lora", "step")]
        cells += [_times(rows, variant, "floor", "eval"), f"{row['kept_bytes'] / 2**20:.1f}"]
        cells += [_times(rows, variant, "peft:lora", figure) for figure in ("kept", "peak")]
        cells += [f"{row['flops'] / 1e9:.1f}", _times(rows, variant, "peft:lora", "flops", 3)]
        cells += [f"{row['operators']:,}", f"{row['launches']:,}"]
        lines.append(f"| {label(variant)} | {' | '.join(cells)} |")
    lines += [f"\n{label(v)} could not be measured: {why}" for v, why in record.get("failed", {}).items()]
    return [*lines, "", *_beside(rows), *_goals(name, rows)]


def _beside(rows: dict) -> list[str]:
    pairs = [
        (variant, rival)
        for variant in rows
        for rival in (*RIVALS.get(variant, ()), variant.replace("diffadapt:", "naive:"))
        if rival in rows and rival != variant
    ]
    if not pairs:
        return []
    figures = ("step", "eval", "kept", "peak", "flops", "operators", "launches")
    lines = ["| | beside | " + " | ".join(figures) + " |", "|---|---|" + "---:|" * len(figures)]
    for variant, rival in pairs:
        cells = [_times(rows, variant, rival, figure) for figure in figures]
        lines.append(f"| {label(variant)} | {label(rival)} | {' | '.join(cells)} |")
    return [*lines, ""]


def _goals(name: str, rows: dict) -> list[str]:
    lines = ["| goal | at most | measured | |", "|---|---:|---:|---|"]
    for goal in GOALS:
        value = ratio(rows, goal.variant, goal.against, goal.figure)
        if value is None or not name.startswith(goal.table):
            continue
        missed = value > goal.limit + SLACK.get(goal.figure, 0.0005)
        verdict = f"**missed by {100 * (value / goal.limit - 1):.1f} %**" if missed else "met"
        what = f"{label(goal.variant)}: {FIGURES[goal.figure]} / {label(goal.against)}"
        lines.append(f"| {what} | {goal.limit:.2f} | {value:.3f} | {verdict} |")
    return lines if len(lines) > 2 else []


def _seconds(row: dict) -> str:
    values = _values(row, "step")
    return f"{statistics.median(values):.3f}" if values else ""


def _times(rows: dict, variant: str, against: str, figure: str, digits: int = 2) -> str:
    value = ratio(rows, variant, against, figure)
    return "" if value is None else f"{value:.{digits}f}"


def _attaching(record: dict) -> list[str]:
    lines = ["To SDXL's denoiser (2,567 million parameters):", "", "| adapter, targets | layers | seconds |"]
    lines.append("|---|---:|---:|")
    for name, row in record["sdxl"].items():
        lines.append(f"| {name} | {row['sites']} | {row['seconds']:.2f} |")
    lines += ["", "Seconds for LoRA on a stack of linear layers (64 x 64), rank 4:", ""]
    lines += ["| layers | attach | save | load |", "|---:|---:|---:|---:|"]
    for times, row in record["growth"].items():
        cells = " | ".join(f"{row[name]:.3f}" for name in ("attach", "save", "load"))
        lines.append(f"| {int(times) * record['layers']:,} | {cells} |")
    return lines


_INTRODUCTION = [
    "Made by `python eval/cost.py --output docs/cost.md`. Everything in a table is measured in turns in one",
    "process, round after round; ratios are taken within a round, and their median is shown.",
    "",
    "- step: forward and backward. Latents and text states take gradients in every row, so that every row",
    "  runs the whole backward. The **floor** is the frozen model: nothing that trains it costs less.",
    "- kept: tensors kept between forward and backward, each storage once, without the base's own weights.",
    "- peak: how far the resident memory of the process rises during a step.",
    "- GFLOP (`torch.utils.flop_counter`), operators dispatched, and those of them that compute, not view",
    "  or allocate (what a GPU pays as launches): forward and backward, the same on every machine.",
    "- plain autograd: the same method with the changed weight as a tensor that autograd sees.",
    "- merged: the adapter folded into the weights.",
    "- A merged model runs the same operators as the floor: how far its time is from 1.00 is noise. Goals",
    f"  on times allow {100 * SLACK['step']:.0f} % of it.",
]

_REASONS = """## Why the goals that are missed are missed

- FLoRA's core is one product more than LoRA's two: on attention 0.07 % more FLOPs. For a convolution it
  multiplies core and kernel factors and returns the gradients of all five, so it dispatches more operators
  than LoRA, most of them on tensors of a few values; in FLOPs and bytes it costs less.
- LieRA and folded SuperLoRA form the weight's gradient, one product more than the frozen model's two, and
  make the changed weight again in backward. Plain autograd keeps that weight instead, for every layer.
- LoHa keeps its own factors, which are twice LoRA's: visible for convolutions.
- DoRA keeps its product before the rows are scaled; `recompute=True` makes it again in backward.
- On small models, where a layer takes well under a millisecond, what is measured is one operator after
  another, not arithmetic.
"""
