"""The page of costs: a table of every variant, one of each method beside its rivals, and the goals."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

from cost_goals import FIGURES, GOALS, SLACK

TEXT = Path(__file__).with_name("cost_page.md")
RIVALS = {  # besides the same method through plain autograd
    "diffadapt:flora": ("lycoris:tucker-bypass", "lycoris:tucker"),
    "diffadapt:dora": ("peft:dora",),
    "diffadapt:liera": ("peft:hira",),
    "diffadapt:loha": ("peft:loha", "lycoris:loha"),
    "diffadapt:lokr": ("peft:lokr", "lycoris:lokr"),
    "diffadapt:vera": ("peft:vera",),
    "diffadapt:pissa": ("peft:pissa",),
}


def page(records: Sequence[tuple[str, dict]]) -> str:
    """The whole document from the finished tables."""
    lines = []
    for name, record in records:
        lines += [f"## {record['title']}", ""]
        lines += _attaching(record) if name == "attach" else _table(name, record)
        lines += ["", f"Measured on {record['machine']}; {record['versions']}.", ""]
    return TEXT.read_text(encoding="utf-8").format(slack=100 * SLACK["step"], tables="\n".join(lines))


def machine(threads: int) -> str:
    """What times depend on besides the versions."""
    pages = ", large pages" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else ""
    return f"{platform.machine()}, {threads} threads{pages}"


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
