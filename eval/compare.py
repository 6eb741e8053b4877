"""Compares evaluations: paired differences with intervals, and what each point of quality costs.

    python eval/compare.py runs/lora/evaluation.json runs/flora/evaluation.json
    python eval/compare.py A.json B.json --output runs/compare --run_json A/run.json B/run.json

Takes the JSON of eval/image_quality.py or eval/subject.py; every generated set in them is one run, the first
is what the others are compared with. Runs that were not evaluated in the same way are refused. Writes
compare.json, compare.md and compare.html.
"""

import argparse
import dataclasses
import shlex
import sys
import textwrap
from collections.abc import Sequence
from html import escape
from pathlib import Path

from diffadapt.common.atomic_files import check_writable_folder, write_atomically
from diffadapt.common.exit_codes import run_command
from diffadapt.common.strict_json import to_json
from diffadapt.evaluation.report.compared_runs import COSTS, Run, points, read_runs
from diffadapt.evaluation.report.comparison import Difference, compare
from diffadapt.evaluation.report.page import document, plot, stamp_of, table
from diffadapt.evaluation.report.plots import pareto_plot
from diffadapt.evaluation.report.tables import (
    MEANING,
    WIDTH,
    items_of,
    markdown_table,
    number,
    tables_by_extractor,
)

COLUMNS = ("score", "run", "first", "value", "difference", "95 % interval", "verdict", "remarks")
CHANCE = 20  # of so many 95 % intervals one misses the truth by chance


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    check_writable_folder(arguments.output)
    runs = read_runs(arguments.records, arguments.run_json or ())
    if arguments.first is not None:
        runs = first_of(runs, arguments.first)
    found = compare(runs)
    rows = [cells(difference) for difference in found]
    folder, command = Path(arguments.output), shlex.join(["python", *sys.argv])
    record = {
        "command": command,
        "first": runs[0].label,
        "runs": {own.label: {"record": str(own.path), "costs": own.costs} for own in runs},
        "differences": [{**dataclasses.asdict(d), "verdict": d.verdict} for d in found],
    }
    _write(folder / "compare.json", to_json(record))
    _write(folder / "compare.md", as_text(runs, found, rows))
    _write(folder / "compare.html", page(runs, found, rows, command))
    print(as_text(runs, found, rows, width=WIDTH))
    print(f"with plots: {folder / 'compare.html'}")
    return 0


def first_of(runs: Sequence[Run], label: str) -> list[Run]:
    """The runs with the one of that label first."""
    chosen = [own for own in runs if own.label == label]
    if not chosen:
        raise ValueError(f"--first {label!r} is none of the runs {', '.join(own.label for own in runs)}")
    return chosen + [own for own in runs if own.label != label]


def cells(difference: Difference) -> dict[str, str]:
    """A row of the table of differences."""
    interval = difference.interval
    pairing = ["paired"] if difference.paired else []
    known = [MEANING[difference.better]] if difference.better in MEANING else []
    method = [interval.method] if interval else []
    note = [difference.note] if difference.note else []
    values = (
        difference.name,
        difference.label,
        number(difference.first),
        number(difference.other),
        f"{'+' if difference.value > 0 else ''}{number(difference.value)}",
        "" if interval is None else f"{number(interval.low)} to {number(interval.high)}",
        difference.verdict,
        "; ".join([*known, *pairing, *method, *note]),
    )
    return dict(zip(COLUMNS, values, strict=True))


def as_text(
    runs: Sequence[Run],
    found: Sequence[Difference],
    rows: Sequence[dict[str, str]],
    *,
    width: int | None = None,
) -> str:
    """The table and, below it, what is to be said of each score.

    Args:
        width: characters of a line, for a terminal; None cuts no names.
    """
    columns = COLUMNS[:-1]
    if width is None:
        table_lines = markdown_table(columns, rows)
    else:
        table_lines = tables_by_extractor(columns, rows, width=width)
    notes = items_of([(row["score"], row["remarks"]) for row in rows])
    closing = textwrap.wrap(" ".join(closing_words(runs, found)), WIDTH)
    return "\n".join([*stamps(runs), *table_lines, "", *notes, "", *closing]) + "\n"


def closing_words(runs: Sequence[Run], found: Sequence[Difference]) -> list[str]:
    """What the table says, and what it does not."""
    clear = [d for d in found if d.verdict in ("better", "worse", "differs")]
    with_interval = sum(d.interval is not None for d in found)
    return [
        f"{len(clear)} of {len(found)} differences from {runs[0].label} are clear at 95 %; among "
        f"{with_interval} intervals about {with_interval / CHANCE:.1f} exclude 0 by chance alone."
    ]


def stamps(runs: Sequence[Run]) -> list[str]:
    """The stamps of the compared records, as Markdown."""
    found = dict.fromkeys(own.record.stamp for own in runs if own.record.stamp)
    return [f"**{stamp}**\n" for stamp in found]


def page(
    runs: Sequence[Run], found: Sequence[Difference], rows: Sequence[dict[str, str]], command: str
) -> str:
    """compare.html: the table, then each score against each cost that is known of two runs or more."""
    plots = []
    for name, score in runs[0].scores.items():
        for cost, heading in COSTS.items():
            known = points(runs, name, cost)
            if len(known) > 1 and score.better:
                figure = pareto_plot(known, cost=heading, score=name, better=score.better)
                plots.append(plot(figure, f"{name} against {heading}"))
    stamp = next((own.record.stamp for own in runs if own.record.stamp), "")
    note = "Broken line: the runs that no other beats in cost and score."
    costs = f'<h2>Quality and cost</h2><p class="faint">{note}</p><div class="plots">{"".join(plots)}</div>'
    title = f"Comparison with {runs[0].label}"
    body = [
        stamp_of(stamp),
        f"<main><h1>{escape(title)}</h1>",
        *(f"<p>{escape(line)}</p>" for line in closing_words(runs, found)),
        table(COLUMNS, rows),
        costs if plots else "",
        f"<p>Made by <code>{escape(command)}</code></p></main>",
    ]
    return document(title, "\n".join(body))


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("records", nargs="+", type=Path, metavar="JSON", help="records of evaluations; sets in them are runs")
    add("--first", metavar="LABEL", help="the run the others are compared with; default: the first")
    add("--run_json", nargs="+", type=Path, help="run.json of each record's training, in their order")
    add("--output", default="runs/compare", help="folder (default: runs/compare)")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
