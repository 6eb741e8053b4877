"""An evaluation as text: a Markdown table of its scores with notes, and a CSV with a row per image."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Mapping, Sequence

from diffadapt.evaluation.record import EvaluationRecord, Score
from diffadapt.metrics.registry import METRICS

IMAGES = "generated / real"  # heading of the numbers of images
COLUMNS = ("score", "set", "value", "95 % interval", "real against real", IMAGES)
MEANING = {
    "lower": "lower is better",
    "higher": "higher is better",
}
WIDTH = 110  # characters of a line of notes, and of a table in a terminal
SHORTEST = 16  # characters that are left of a name that is cut to fit


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
    values = (
        score.name,
        score.generated,
        number(score.value),
        "" if interval is None else f"{number(interval.low)} to {number(interval.high)}",
        "" if score.floor is None else number(score.floor),
        " / ".join(f"{count:,}" for count in score.n.values()),
    )
    return dict(zip(COLUMNS, values, strict=True))


def score_rows(record: EvaluationRecord) -> list[dict[str, str]]:
    """The rows of the table of scores: every score of all sets together, in the order of first appearance."""
    places = {name: i for i, name in enumerate(dict.fromkeys(score.name for score in record.scores))}
    return [score_cells(score) for score in sorted(record.scores, key=lambda score: places[score.name])]


def score_notes(record: EvaluationRecord) -> dict[str, str]:
    """Scores -> what their values mean, how intervals were found, their paper, and what limits them.

    What holds of some sets alone names them; scores of which the same is to be said stand together.
    """
    by_name: dict[str, list[Score]] = {}
    for score in record.scores:
        by_name.setdefault(score.name, []).append(score)
    names_of: dict[str, list[str]] = {}
    for name, scores in by_name.items():
        names_of.setdefault(_notes_of(scores), []).append(name)
    return {", ".join(names): text for text, names in names_of.items()}


def _notes_of(scores: Sequence[Score]) -> str:
    sets_of: dict[str, list[str]] = {}  # remark -> the sets it is of
    for score in scores:
        remarks = [MEANING[score.better]] if score.better in MEANING else []
        if score.interval is not None:
            remarks.append(f"interval: {score.interval.method}")
        for remark in (*remarks, *score.notes):
            sets_of.setdefault(remark, []).append(score.generated)
    parts = []
    for remark, labels in sets_of.items():
        is_of_all = len(labels) == len(scores)
        parts.append(remark if is_of_all else f"{', '.join(labels)}: {remark}")
    metric = METRICS.get(scores[0].metric)
    if metric is not None and metric.source:
        parts.append(metric.source)
    return "; ".join(parts)


def remarks_of_run(record: EvaluationRecord) -> list[str]:
    """Warnings, those of several sets together where they say the same, and what was not computed."""
    labels_of: dict[str, list[str]] = {}
    for warning in record.warnings:
        label, separator, text = warning.partition(": ")
        is_of_set = bool(separator) and label in record.sets
        labels = labels_of.setdefault(text if is_of_set else warning, [])
        if is_of_set:
            labels.append(label)
    lines = []
    for text, labels in labels_of.items():
        lines.append(f"warning: {', '.join(labels)}: {text}" if labels else f"warning: {text}")
    return [*lines, *(f"not computed: {what}: {why}" for what, why in record.refused.items())]


def markdown(record: EvaluationRecord, *, width: int | None = None) -> str:
    """Scores, their notes, warnings and refusals as Markdown, under the record's stamp.

    Args:
        width: characters of a table's lines, for a terminal: a table for each extractor, without its name in
            those of the scores, and what is still too long is cut. The notes have the names in full.
            None: one table, which cuts none.
    """
    lines = [f"**{record.stamp}**", ""] if record.stamp else []
    rows = score_rows(record)
    if not rows:
        lines.append("No score could be computed.")
    elif width is None:
        lines += markdown_table(COLUMNS, rows)
    else:
        lines += tables_by_extractor(COLUMNS, rows, width=width)
    notes = [f"`{name}`: {text}" for name, text in score_notes(record).items() if text]
    for block in (notes, remarks_of_run(record)):
        if block:
            lines += ["", *(line for note in block for line in list_item(note))]
    return "\n".join(lines) + "\n"


def report(record: EvaluationRecord) -> str:
    """`markdown`, and below it what one needs to cite the scores or to make them again."""
    return markdown(record) + "\n" + "\n".join(["## How it was made", "", *_making(record)]) + "\n"


def _making(record: EvaluationRecord) -> list[str]:
    extractors = [
        {
            "extractor": extractor.name,
            "resize": f"{extractor.preset} to {extractor.side}",
            "layers": ", ".join(extractor.layers),
            "SHA-256 of the weights": extractor.sha256,
        }
        for extractor in record.extractors
    ]
    sets = [
        {
            "set": label,
            "role": summary.role,
            "images": f"{summary.count:,}",
            "source": summary.source,
            "SHA-256 of its images": summary.fingerprint,
        }
        for label, summary in record.sets.items()
    ]
    lines: list[str] = []
    for rows in (extractors, sets):
        if rows:
            lines += [*markdown_table(list(rows[0]), rows), ""]
    facts = {
        "seeds": ", ".join(f"{name} {seed}" for name, seed in record.seeds.items()),
        "versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
        "device": str(record.settings.get("device") or ""),
        "protocol": str(record.settings.get("protocol") or ""),
        "command": f"`{record.settings['command']}`" if record.settings.get("command") else "",
    }
    return lines + [line for name, text in facts.items() if text for line in list_item(f"{name}: {text}")]


def tables_by_extractor(
    columns: Sequence[str], rows: Sequence[Mapping[str, str]], *, width: int
) -> list[str]:
    """The lines of tables of scores, whose extractors, `precision[EXTRACTOR]`, stand above their tables."""
    rows_of: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        name, _, extractor = row["score"].removesuffix("]").partition("[")
        rows_of.setdefault(extractor, []).append({**row, "score": name})
    lines: list[str] = []
    for extractor, those in rows_of.items():
        if lines:
            lines.append("")
        if extractor:
            lines += [f"extractor: {extractor}", ""]
        lines += markdown_table(columns, those, width=width)
    return lines


def markdown_table(
    columns: Sequence[str], rows: Sequence[Mapping[str, str]], *, width: int | None = None
) -> list[str]:
    """The lines of a table, columns aligned; columns without any value are left out.

    Args:
        width: characters of a line, to which the longest cells are cut in their middle; None cuts none.
    """
    used = [column for column in columns if any(row.get(column) for row in rows)]
    cells = [[_cell(row.get(column, "")) for column in used] for row in rows]
    table = [[_cell(column) for column in used], *cells]
    widths = [max(len(row[place]) for row in table) for place in range(len(used))]
    while width is not None and sum(widths) + 3 * len(widths) + 1 > width and max(widths) > SHORTEST:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for row in table:
        padded = (shortened(cell, size).ljust(size) for cell, size in zip(row, widths, strict=True))
        lines.append(f"| {' | '.join(padded)} |")
    rule = f"|{'|'.join('-' * (size + 2) for size in widths)}|"
    return [lines[0], rule, *lines[1:]]


def shortened(text: str, length: int) -> str:
    """A text cut in its middle to a length."""
    if len(text) <= length:
        return text
    return f"{text[: length // 2]}…{text[len(text) - (length - 1) // 2 :]}"


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


def _cell(text: str) -> str:
    return _one_line(text).replace("|", "\\|")


def items_of(notes: Sequence[tuple[str, str]]) -> list[str]:
    """Names and what is to be said of them as items of a list: once for all names of which the same holds."""
    names_of: dict[str, list[str]] = {}
    for name, text in notes:
        names = names_of.setdefault(text, [])
        if name not in names:
            names.append(name)
    lines: list[str] = []
    for text, names in names_of.items():
        if text:
            lines += list_item(f"`{', '.join(names)}`: {text}")
    return lines


def list_item(text: str) -> list[str]:
    """An item of a list, in lines of WIDTH; what it lists line by line stands behind commas."""
    text = text.replace(":\n", ": ").replace("\n", ", ")
    return textwrap.wrap(
        f"- {_one_line(text)}",
        WIDTH,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())
