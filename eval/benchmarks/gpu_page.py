"""The page of costs on a GPU, from the records of eval/benchmarks/gpu.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import cost_page

INTRODUCTION = """\
# What adapters cost on a GPU

Made by `python eval/benchmarks/gpu.py --minutes 8 --output docs/gpu.md`. Bases have random weights: time and
memory do not depend on them. Rank 16.

- step: forward and backward, milliseconds, the median of three rounds. Latents and text states take gradients
  in every row, so that every row runs the whole backward. The **floor** is the frozen model; "floor again" is
  the same model measured after all others: the difference is noise.
- peak: the most memory allocated during a step, base included; rise: how much of it the step added.
- Bases in half precision run under autocast, what is trained is float32, as with `--mixed_precision`.
- At a batch of one, a fast GPU waits for the machine that launches its kernels: times follow the number of
  operators more than their arithmetic, and differ from machine to machine. Memory does not.
"""
NEVER_RUN = "It has not been run on a GPU yet.\n"
NO_TIME = "no time left"  # why a row was not measured


def page(records: dict, tables: Sequence[str]) -> str:
    """The whole document.

    Args:
        records: as eval/benchmarks/gpu.py writes them.
        tables: names of tables, in the order of the page.

    Returns:
        Markdown.
    """
    if "machine" not in records:
        return INTRODUCTION + "\n" + NEVER_RUN
    lines = [INTRODUCTION, f"Measured on {records['machine']}.\n"]
    for name in tables:
        if records.get(name, {}).get("rows"):
            lines += table_lines(records[name])
    if records.get("evaluation"):
        lines += extractor_lines(records["evaluation"])
    if "seconds" in records.get("demo", {}):
        demo = records["demo"]
        lines.append("## The default run\n")
        lines.append(
            "`train_scripts/dreambooth.py --adapter flora` on the embedded base: "
            f"{demo['seconds']:.0f} s with imports, images and figures.\n"
        )
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
            times(rows, variant, "floor", "step_seconds"),
            times(rows, variant, "peft:lora", "step_seconds"),
            times(rows, variant, "floor", "eval_seconds"),
            f"{row['peak_bytes'] / 2**30:.2f}",
            f"{row['rise_bytes'] / 2**20:.0f}",
        ]
        lines.append(f"| {label(variant)} | {' | '.join(cells)} |")
    missing = [label(variant) for variant, reason in record["failed"].items() if reason == NO_TIME]
    if missing:
        lines.append(f"\nNot measured, as the time was over: {', '.join(missing)}.")
    for variant, reason in record["failed"].items():
        if reason != NO_TIME:
            lines.append(f"\n{label(variant)} failed: {reason}")
    return [*lines, ""]


def label(variant: str) -> str:
    """The name of a row on the page."""
    return variant if variant == "floor again" else cost_page.label(variant)


def extractor_lines(record: dict) -> list[str]:
    """A table of the networks that make features for the metrics."""
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


def times(rows: dict, variant: str, against: str, field: str) -> str:
    """How many times as long a row takes as another; empty where the other is missing."""
    if against not in rows:
        return ""
    ratio = statistics.median(rows[variant][field]) / statistics.median(rows[against][field])
    return f"{ratio:.2f}"
