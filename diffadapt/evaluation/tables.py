"""An evaluation as text: a Markdown table of its scores, and a CSV with a row per generated image."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence

from diffadapt.evaluation.record import EvaluationRecord, Score

COLUMNS = ("score", "set", "value", "95 % interval", "real against real", "images", "remarks")
MEANING = {
    "lower": "lower is better",
    "higher": "higher is better",
}


def number(value: float) -> str:
    """Four significant digits, without exponents where a reader does not need them."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite" if value > 0 else "-infinite"
    if value == 0 or 1e-3 <= abs(value) < 1000:
        return f"{value:.4g}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.2e}"


def score_cells(score: Score) -> dict[str, str]:
    """One row of the table of scores, by column."""
    interval = score.interval
    remarks = [MEANING[score.better]] if score.better in MEANING else []
    if interval is not None:
        remarks.append(f"interval: {interval.method}")
    values = (
        score.name,
        score.generated,
        number(score.value),
        "" if interval is None else f"{number(interval.low)} to {number(interval.high)}",
        "" if score.floor is None else number(score.floor),
        " / ".join(f"{count:,} {role}" for role, count in score.n.items()),
        "; ".join([*remarks, *score.notes]),
    )
    return dict(zip(COLUMNS, values, strict=True))


def score_rows(record: EvaluationRecord) -> list[dict[str, str]]:
    """The rows of the table of scores: every score of all sets together, in the order of first appearance."""
    places = {name: i for i, name in enumerate(dict.fromkeys(score.name for score in record.scores))}
    return [score_cells(score) for score in sorted(record.scores, key=lambda score: places[score.name])]


def markdown(record: EvaluationRecord) -> str:
    """Scores, warnings and refusals as Markdown, under the record's stamp."""
    lines = [f"**{record.stamp}**", ""] if record.stamp else []
    lines += markdown_table(COLUMNS, score_rows(record))
    notes = [f"warning: {text}" for text in record.warnings]
    notes += [f"not computed: {what}: {why}" for what, why in record.refused.items()]
    if notes:
        lines += ["", *[f"- {_one_line(note)}" for note in notes]]
    return "\n".join(lines) + "\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The lines of a table; columns without any value are left out."""
    used = [column for column in columns if any(row.get(column) for row in rows)]
    lines = [_line(used), "|" + "---|" * len(used)]
    return [*lines, *(_line([row.get(column, "") for column in used]) for row in rows)]


def per_image_csv(record: EvaluationRecord) -> str:
    """A row per generated image: its set, name, prompt, seed, nearest real image, and every figure of it.

    Under a stamp every row carries it, in a last column.
    """
    stamp = [record.stamp] if record.stamp else []
    figures = list(dict.fromkeys(name for row in record.images for name in row.values))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["set", "image", "prompt", "seed", "nearest", "nearest_in", *figures]
    writer.writerow([*head, "stamp"] if stamp else head)
    for row in record.images:
        facts = [row.generated, row.name, row.prompt, row.seed, row.nearest, row.nearest_in]
        writer.writerow([*facts, *(row.values.get(name) for name in figures), *stamp])
    return text.getvalue()


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in cells) + " |"


def _one_line(text: str) -> str:
    return " ".join(text.split())
