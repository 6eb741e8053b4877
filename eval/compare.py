"""Compares evaluations: paired differences with intervals, and quality against the cost of training.

    python eval/compare.py runs/lora/evaluation.json runs/flora/evaluation.json
    python eval/compare.py A.json B.json --output runs/compare --run_json A/run.json B/run.json

Takes the JSON of eval/image_quality.py or eval/subject.py. Every generated set in them is a run; all are
compared with the first. Runs that were not evaluated in the same way are refused. Writes compare.json,
compare.md and compare.html.
"""

import argparse
import dataclasses
import shlex
import sys
import textwrap
from collections.abc import Sequence
from html import escape
from pathlib import Path

from diffadapt.common.atomic_files import check_writable_folder, write_utf8
from diffadapt.common.exit_codes import run_command
from diffadapt.common.strict_json import to_json
from diffadapt.evaluation.report.compared_runs import COSTS, ComparedRun, pareto_points, read_runs
from diffadapt.evaluation.report.comparison import Difference, compare
from diffadapt.evaluation.report.page import document, plot, stamp_band, table
from diffadapt.evaluation.report.plots import pareto_plot
from diffadapt.evaluation.report.tables import (
    MEANING,
    WIDTH,
    markdown_table,
    notes_by_name,
    number,
    tables_by_extractor,
)

COLUMNS = ("score", "run", "first", "value", "difference", "95 % interval", "verdict", "remarks")
INTERVALS_PER_MISS = 20  # one 95 % interval in 20 misses the truth by chance


def main(argv: list[str] | None = None) -> int:
    """Compares the records and writes three files. Returns the exit code."""
    arguments = _parser().parse_args(argv)
    check_writable_folder(arguments.output)
    runs = read_runs(arguments.records, arguments.run_json or ())
    if arguments.first is not None:
        runs = put_first(runs, arguments.first)
    differences = compare(runs)
    command = shlex.join(["python", *sys.argv])
    folder = Path(arguments.output)
    write_utf8(folder / "compare.json", to_json(record(runs, differences, command)))
    write_utf8(folder / "compare.md", as_text(runs, differences))
    write_utf8(folder / "compare.html", page(runs, differences, command))
    print(as_text(runs, differences, width=WIDTH))
    print(f"with plots: {folder / 'compare.html'}")
    return 0


def put_first(runs: Sequence[ComparedRun], label: str) -> list[ComparedRun]:
    """The runs with the one of a label first."""
    matching = [run for run in runs if run.label == label]
    if not matching:
        labels = ", ".join(run.label for run in runs)
        raise ValueError(f"--first {label!r} is none of the runs {labels}")
    return matching + [run for run in runs if run.label != label]


def record(runs: Sequence[ComparedRun], differences: Sequence[Difference], command: str) -> dict[str, object]:
    """The content of compare.json."""
    run_entries = {run.label: {"record": str(run.path), "costs": run.costs} for run in runs}
    difference_entries = []
    for difference in differences:
        difference_entries.append({**dataclasses.asdict(difference), "verdict": difference.verdict})
    return {
        "command": command,
        "first": runs[0].label,
        "runs": run_entries,
        "differences": difference_entries,
    }


def cells(difference: Difference) -> dict[str, str]:
    """A row of the table of differences."""
    interval = difference.interval
    remarks = []
    if difference.better in MEANING:
        remarks.append(MEANING[difference.better])
    if difference.paired:
        remarks.append("paired")
    if interval is not None:
        remarks.append(interval.method)
    if difference.note:
        remarks.append(difference.note)
    sign = "+" if difference.value > 0 else ""
    values = (
        difference.name,
        difference.label,
        number(difference.first),
        number(difference.other),
        f"{sign}{number(difference.value)}",
        "" if interval is None else f"{number(interval.low)} to {number(interval.high)}",
        difference.verdict,
        "; ".join(remarks),
    )
    return dict(zip(COLUMNS, values, strict=True))


def as_text(
    runs: Sequence[ComparedRun], differences: Sequence[Difference], *, width: int | None = None
) -> str:
    """The table of differences and, below it, the remarks on each score, as Markdown.

    Args:
        runs: the compared runs.
        differences: from the first run.
        width: characters of a line, for a terminal; None does not cut names.
    """
    rows = [cells(difference) for difference in differences]
    columns = COLUMNS[:-1]  # the remarks stand below the table
    if width is None:
        table_lines = markdown_table(columns, rows)
    else:
        table_lines = tables_by_extractor(columns, rows, width=width)
    stamp_lines = [f"**{stamp}**\n" for stamp in stamps(runs)]
    notes = notes_by_name([(row["score"], row["remarks"]) for row in rows])
    closing_lines = textwrap.wrap(closing_sentence(runs, differences), WIDTH)
    return "\n".join([*stamp_lines, *table_lines, "", *notes, "", *closing_lines]) + "\n"


def closing_sentence(runs: Sequence[ComparedRun], differences: Sequence[Difference]) -> str:
    """The number of clear differences, and how many to expect by chance."""
    num_clear = 0
    num_intervals = 0
    for difference in differences:
        num_clear += difference.verdict in ("better", "worse", "differs")
        num_intervals += difference.interval is not None
    return (
        f"{num_clear} of {len(differences)} differences from {runs[0].label} are clear at 95 %; among "
        f"{num_intervals} intervals about {num_intervals / INTERVALS_PER_MISS:.1f} exclude 0 by chance alone."
    )


def stamps(runs: Sequence[ComparedRun]) -> list[str]:
    """The stamps of the compared records, each once."""
    return list(dict.fromkeys(run.record.stamp for run in runs if run.record.stamp))


def page(runs: Sequence[ComparedRun], differences: Sequence[Difference], command: str) -> str:
    """The content of compare.html: the table, then each score against each cost known of two runs or more."""
    plots = []
    for name, score in runs[0].scores.items():
        for cost, axis_label in COSTS.items():
            points = pareto_points(runs, name, cost)
            if len(points) > 1 and score.better:
                figure = pareto_plot(points, cost=axis_label, score=name, better=score.better)
                plots.append(plot(figure, f"{name} against {axis_label}"))
    title = f"Comparison with {runs[0].label}"
    run_stamps = stamps(runs)
    body = [
        stamp_band(run_stamps[0] if run_stamps else ""),
        f"<main><h1>{escape(title)}</h1>",
        f"<p>{escape(closing_sentence(runs, differences))}</p>",
        table(COLUMNS, [cells(difference) for difference in differences]),
    ]
    if plots:
        note = "Broken line: the runs that no other beats in cost and score."
        body.append(f'<h2>Quality and cost</h2><p class="faint">{note}</p>')
        body.append(f'<div class="plots">{"".join(plots)}</div>')
    body.append(f"<p>Made by <code>{escape(command)}</code></p></main>")
    return document(title, "\n".join(body))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("records", nargs="+", type=Path, metavar="JSON", help="evaluation records; each set in them is a run")
    add("--first", metavar="LABEL", help="run that the others are compared with (default: the first)")
    add("--run_json", nargs="+", type=Path, help="run.json of each record's training run, in the same order")
    add("--output", default="runs/compare", help="output folder (default: runs/compare)")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
