"""The page of costs: a table of every variant, one of each method beside its rivals, and the goals."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TEXT = Path(__file__).with_name("cost_page.md")
RIVALS = {  # besides the same method in plain autograd
    "diffadapt:flora": ("lycoris:tucker-bypass", "lycoris:tucker"),
    "diffadapt:dora": ("peft:dora",),
    "diffadapt:liera": ("peft:hira",),
    "diffadapt:loha": ("peft:loha", "lycoris:loha"),
    "diffadapt:lokr": ("peft:lokr", "lycoris:lokr"),
    "diffadapt:vera": ("peft:vera",),
    "diffadapt:pissa": ("peft:pissa",),
}
COSTS = {  # kind of cost -> its name in the goals
    "step": "step time",
    "kept": "kept for backward",
    "eval": "eval forward",
    "flops": "FLOPs",
    "operators": "operators",
    "launches": "launches",
}
SLACK = {"step": 0.02, "eval": 0.02}  # difference between two runs of the same model
COUNT_SLACK = 0.0005  # of costs that do not depend on time
PACKAGES = ("torch", "diffusers", "peft", "lycoris-lora")


@dataclass(frozen=True)
class Goal:
    """An upper limit of a cost relative to another variant.

    Attributes:
        variant: the row.
        cost: a key of COSTS.
        against: the row it is compared with.
        limit: the largest ratio.
        table: beginning of the names of tables in which it holds.
    """

    variant: str
    cost: str
    against: str
    limit: float
    table: str = ""


def _goals() -> list[Goal]:
    """The goals in the order of the page."""
    lora_like = ("diffadapt:lora", "diffadapt:flora")
    weight_space = ("liera", "liera(order=exp)", "superlora")  # methods that form the changed weight
    goals = [Goal(variant, "step", "peft:lora", 1.03) for variant in lora_like]
    for table in ("attention", "batch4"):
        goals += [Goal(variant, "kept", "peft:lora", 1.0, table) for variant in lora_like]
    goals += [Goal(variant, "kept", "peft:lora", 1.05, "conv") for variant in lora_like]
    for cost in ("flops", "operators", "launches"):
        goals += [Goal(variant, cost, "peft:lora", 1.0) for variant in lora_like]
    goals += [
        Goal("diffadapt:flora", "step", "lycoris:tucker-bypass", 1.0),
        Goal("diffadapt:1lora", "step", "floor", 1.05),
        Goal("diffadapt:1lora", "kept", "floor", 1.01),
        Goal("diffadapt:dora", "step", "peft:lora", 1.25),
    ]
    goals += [Goal(f"diffadapt:{method}", "step", f"naive:{method}", 0.7) for method in weight_space]
    goals += [Goal(f"diffadapt:{method}", "step", "peft:hira", 0.7) for method in weight_space]
    goals += [Goal(f"diffadapt:{method}", "step", "peft:lora", 1.6, "batch4") for method in weight_space]
    for method in (*weight_space, "loha", "lokr"):
        goals.append(Goal(f"diffadapt:{method}", "kept", "peft:lora", 1.05))
    goals += [
        Goal("diffadapt:loha", "step", "peft:lora", 1.5),
        Goal("diffadapt:lokr", "step", "peft:lora", 1.2),
    ]
    for cost in ("step", "eval"):
        goals += [Goal(f"merged:{method}", cost, "floor", 1.0) for method in ("lora", "flora")]
    return goals


def page(records: Sequence[tuple[str, dict]]) -> str:
    """The whole page.

    Args:
        records: name and record of each finished table, in order.
    """
    lines = []
    for name, record in records:
        lines += [f"## {record['title']}", ""]
        lines += _attaching_lines(record) if name == "attach" else _table_lines(name, record)
        lines += ["", f"Measured on {record['machine']}; {record['versions']}.", ""]
    return TEXT.read_text(encoding="utf-8").format(slack=100 * SLACK["step"], tables="\n".join(lines))


def machine(threads: int) -> str:
    """The parts of the machine that times depend on, besides versions."""
    pages = ", large pages" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else ""
    return f"{platform.machine()}, {threads} threads{pages}"


def versions() -> str:
    """The versions of the compared packages."""
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)


def label(variant: str) -> str:
    """The name of a variant on the page."""
    maker, _, name = variant.partition(":")
    labels = {
        "floor": "floor: frozen model",
        "peft": f"PEFT {name}",
        "lycoris": f"LyCORIS {name}",
        "naive": f"`{name}` in plain autograd",
        "merged": f"`{name}`, merged",
    }
    return labels.get(maker, f"**`{name}`**")


def ratio(rows: dict, variant: str, against: str, cost: str) -> float | None:
    """The cost of a variant relative to another, median over rounds; None where either was not measured."""
    if variant not in rows or against not in rows:
        return None
    ratios = []
    for value, other in zip(_values(rows[variant], cost), _values(rows[against], cost), strict=True):
        if other:
            ratios.append(value / other)
    return statistics.median(ratios) if ratios else None


def _values(row: dict, cost: str) -> list[float]:
    """The cost in every round; one value for costs that are counted."""
    timed = {"step": "step_seconds", "eval": "eval_seconds", "peak": "rise_bytes"}
    if cost in timed:
        return [timing[timed[cost]] for timing in row["timings"]]
    return [row["kept_bytes" if cost == "kept" else cost]]


def _table_lines(name: str, record: dict) -> list[str]:
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
        cells = [
            f"{row['parameters']:,}",
            _median_seconds(row),
            _ratio_cell(rows, variant, "floor", "step"),
            _ratio_cell(rows, variant, "peft:lora", "step"),
            _ratio_cell(rows, variant, "floor", "eval"),
            f"{row['kept_bytes'] / 2**20:.1f}",
            _ratio_cell(rows, variant, "peft:lora", "kept"),
            _ratio_cell(rows, variant, "peft:lora", "peak"),
            f"{row['flops'] / 1e9:.1f}",
            _ratio_cell(rows, variant, "peft:lora", "flops", digits=3),
            f"{row['operators']:,}",
            f"{row['launches']:,}",
        ]
        lines.append(f"| {label(variant)} | {' | '.join(cells)} |")
    for variant, reason in record.get("failed", {}).items():
        lines.append(f"\n{label(variant)} could not be measured: {reason}")
    return [*lines, "", *_rival_lines(rows), *_goal_lines(name, rows)]


def _rival_lines(rows: dict) -> list[str]:
    """A table of each method relative to the same method in other programs and in plain autograd."""
    costs = ("step", "eval", "kept", "peak", "flops", "operators", "launches")
    lines = []
    for variant in rows:
        for rival in (*RIVALS.get(variant, ()), variant.replace("diffadapt:", "naive:")):
            if rival in rows and rival != variant:
                cells = [_ratio_cell(rows, variant, rival, cost) for cost in costs]
                lines.append(f"| {label(variant)} | {label(rival)} | {' | '.join(cells)} |")
    if not lines:
        return []
    return [f"| | beside | {' | '.join(costs)} |", "|---|---|" + "---:|" * len(costs), *lines, ""]


def _goal_lines(name: str, rows: dict) -> list[str]:
    lines = []
    for goal in _goals():
        value = ratio(rows, goal.variant, goal.against, goal.cost)
        if value is None or not name.startswith(goal.table):
            continue
        is_missed = value > goal.limit + SLACK.get(goal.cost, COUNT_SLACK)
        verdict = f"**missed by {100 * (value / goal.limit - 1):.1f} %**" if is_missed else "met"
        text = f"{label(goal.variant)}: {COSTS[goal.cost]} / {label(goal.against)}"
        lines.append(f"| {text} | {goal.limit:.2f} | {value:.3f} | {verdict} |")
    if not lines:
        return []
    return ["| goal | at most | measured | |", "|---|---:|---:|---|", *lines]


def _median_seconds(row: dict) -> str:
    values = _values(row, "step")
    return f"{statistics.median(values):.3f}" if values else ""


def _ratio_cell(rows: dict, variant: str, against: str, cost: str, *, digits: int = 2) -> str:
    value = ratio(rows, variant, against, cost)
    return "" if value is None else f"{value:.{digits}f}"


def _attaching_lines(record: dict) -> list[str]:
    lines = [
        "To SDXL's denoiser (2,567 million parameters):",
        "",
        "| adapter, targets | layers | seconds |",
        "|---|---:|---:|",
    ]
    for name, row in record["sdxl"].items():
        lines.append(f"| {name} | {row['sites']} | {row['seconds']:.2f} |")
    lines += [
        "",
        "Seconds for LoRA on a stack of linear layers (64 x 64), rank 4:",
        "",
        "| layers | attach | save | load |",
        "|---:|---:|---:|---:|",
    ]
    for factor, row in record["growth"].items():
        num_layers = int(factor) * record["layers"]
        lines.append(f"| {num_layers:,} | {row['attach']:.3f} | {row['save']:.3f} | {row['load']:.3f} |")
    return lines
