"""An evaluation as text: a Markdown table of its scores with notes, and a CSV with a row per image."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from diffadapt.evaluation.record import EvaluationRecord, Score
from diffadapt.metrics.registry import METRICS

IMAGES = "generated / real"  # heading of the numbers of images
COLUMNS = ("score", "set", "value", "95 % interval", "real against real", IMAGES)
MEANING = {
    "lower": "lower is better",
    "higher": "higher is better",
}
WIDTH = 110  # characters of a line of notes, and of a table in a terminal
MIN_CELL_WIDTH = 16  # characters to which cells may be cut to fit a terminal


def number(value: float) -> str:
    """Four significant digits, without exponents where a reader does not need them."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
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
    """The rows of the table of scores: each score of all sets together, in the order of first appearance."""
    rows = []
    for scores in _scores_by_name(record).values():
        for score in scores:
            rows.append(score_cells(score))
    return rows


def score_notes(record: EvaluationRecord) -> dict[str, str]:
    """Names of scores -> the meaning of their values, the method of intervals, their paper, their limits.

    Remarks about some sets only name those sets; scores with the same notes share an entry.
    """
    names_by_note: dict[str, list[str]] = {}
    for name, scores in _scores_by_name(record).items():
        names_by_note.setdefault(_note_of(scores), []).append(name)
    notes = {}
    for note, names in names_by_note.items():
        notes[", ".join(names)] = note
    return notes


def remarks_of_run(record: EvaluationRecord) -> list[str]:
    """Warnings, the same one of several sets once, and the scores that were not computed."""
    labels_by_text: dict[str, list[str]] = {}
    for warning in record.warnings:
        label, separator, text = warning.partition(": ")  # "LABEL: TEXT", or a text about no set
        if separator and label in record.sets:
            labels_by_text.setdefault(text, []).append(label)
        else:
            labels_by_text.setdefault(warning, [])
    lines = []
    for text, labels in labels_by_text.items():
        lines.append(f"warning: {', '.join(labels)}: {text}" if labels else f"warning: {text}")
    for name, reason in record.refused.items():
        lines.append(f"not computed: {name}: {reason}")
    return lines


def markdown(record: EvaluationRecord, *, width: int | None = None) -> str:
    """Scores, their notes, warnings and refusals as Markdown, under the record's stamp.

    Args:
        record: the evaluation.
        width: characters of a table's lines, for a terminal: one table for each extractor, whose name is
            left out of the names of the scores, and cells that are still too long are cut. The notes have
            the names in full. None: one table with whole names.
    """
    lines = [f"**{record.stamp}**", ""] if record.stamp else []
    rows = score_rows(record)
    if not rows:
        lines.append("No score could be computed.")
    elif width is None:
        lines += markdown_table(COLUMNS, rows)
    else:
        lines += tables_by_extractor(COLUMNS, rows, width=width)
    notes = []
    for name, text in score_notes(record).items():
        if text:
            notes.append(f"`{name}`: {text}")
    for block in (notes, remarks_of_run(record)):
        if block:
            lines += ["", *list_items(block)]
    return "\n".join(lines) + "\n"


def report(record: EvaluationRecord) -> str:
    """`markdown`, and below it what one needs to cite the scores or to compute them again."""
    return markdown(record) + "\n" + "\n".join(["## How it was made", "", *_provenance(record)]) + "\n"


def _scores_by_name(record: EvaluationRecord) -> dict[str, list[Score]]:
    by_name: dict[str, list[Score]] = {}
    for score in record.scores:
        by_name.setdefault(score.name, []).append(score)
    return by_name


def _note_of(scores: Sequence[Score]) -> str:
    """The note of one score of several sets."""
    labels_by_remark: dict[str, list[str]] = {}
    for score in scores:
        remarks = [MEANING[score.better]] if score.better in MEANING else []
        if score.interval is not None:
            remarks.append(f"interval: {score.interval.method}")
        for remark in (*remarks, *score.notes):
            labels_by_remark.setdefault(remark, []).append(score.generated)
    parts = []
    for remark, labels in labels_by_remark.items():
        applies_to_all = len(labels) == len(scores)
        parts.append(remark if applies_to_all else f"{', '.join(labels)}: {remark}")
    metric = METRICS.get(scores[0].metric)
    if metric is not None and metric.source:
        parts.append(metric.source)
    return "; ".join(parts)


def _provenance(record: EvaluationRecord) -> list[str]:
    """Extractors, sets, seeds, versions, device and command."""
    extractor_rows = []
    for extractor in record.extractors:
        extractor_rows.append(
            {
                "extractor": extractor.name,
                "resize": f"{extractor.preset} to {extractor.side}",
                "layers": ", ".join(extractor.layers),
                "SHA-256 of the weights": extractor.sha256,
            }
        )
    set_rows = []
    for label, summary in record.sets.items():
        set_rows.append(
            {
                "set": label,
                "role": summary.role,
                "images": f"{summary.count:,}",
                "source": summary.source,
                "SHA-256 of its images": summary.fingerprint,
            }
        )
    lines: list[str] = []
    for rows in (extractor_rows, set_rows):
        if rows:
            lines += [*markdown_table(list(rows[0]), rows), ""]
    command = record.settings.get("command")
    seeds = [f"{name} {seed}" for name, seed in record.seeds.items()]
    versions = [f"{name} {version}" for name, version in record.versions.items()]
    facts = {
        "seeds": ", ".join(seeds),
        "versions": ", ".join(versions),
        "device": str(record.settings.get("device") or ""),
        "protocol": str(record.settings.get("protocol") or ""),
        "command": f"`{command}`" if command else "",
    }
    items = []
    for name, text in facts.items():
        if text:
            items.append(f"{name}: {text}")
    return lines + list_items(items)


def tables_by_extractor(
    columns: Sequence[str], rows: Sequence[Mapping[str, str]], *, width: int
) -> list[str]:
    """The lines of tables of scores, one for each extractor, whose name stands above its table.

    Args:
        columns: headings, in order; one of them is "score".
        rows: cells by column, with scores named `precision[EXTRACTOR]`.
        width: characters of a line.
    """
    rows_by_extractor: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        # "fid" has no brackets: its extractor is Inception by definition
        name, _, extractor = row["score"].removesuffix("]").partition("[")
        rows_by_extractor.setdefault(extractor, []).append({**row, "score": name})
    lines: list[str] = []
    for extractor, extractor_rows in rows_by_extractor.items():
        if lines:
            lines.append("")
        if extractor:
            lines += [f"extractor: {extractor}", ""]
        lines += markdown_table(columns, extractor_rows, width=width)
    return lines


def markdown_table(
    columns: Sequence[str], rows: Sequence[Mapping[str, str]], *, width: int | None = None
) -> list[str]:
    """The lines of a table with aligned columns; columns without any value are left out.

    Args:
        columns: headings, in order.
        rows: cells by column; missing cells are empty.
        width: characters of a line, to which the longest cells are cut in their middle; None cuts none.
    """
    used_columns = columns_with_values(columns, rows)
    table = [[_escape_cell(column) for column in used_columns]]
    for row in rows:
        table.append([_escape_cell(row.get(column, "")) for column in used_columns])
    widths = []
    for column_cells in zip(*table, strict=True):
        widths.append(max(len(cell) for cell in column_cells))
    if width is not None:
        _shrink(widths, width)
    lines = []
    for cells in table:
        padded = []
        for cell, size in zip(cells, widths, strict=True):
            padded.append(shortened(cell, size).ljust(size))
        lines.append(f"| {' | '.join(padded)} |")
    rule = "|".join("-" * (size + 2) for size in widths)  # a space on either side of a cell
    return [lines[0], f"|{rule}|", *lines[1:]]


def columns_with_values(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The columns that are not empty in every row."""
    used_columns = []
    for column in columns:
        if any(row.get(column) for row in rows):
            used_columns.append(column)
    return used_columns


def _shrink(widths: list[int], line_width: int) -> None:
    """Shrinks the widest columns until a line fits, or none is wider than MIN_CELL_WIDTH."""
    separators = 3 * len(widths) + 1  # "| " and " " of each cell, and the last "|"
    while sum(widths) + separators > line_width and max(widths) > MIN_CELL_WIDTH:  # widest first
        widths[widths.index(max(widths))] -= 1


def shortened(text: str, length: int) -> str:
    """A text cut in its middle to a length."""
    if len(text) <= length:
        return text
    return f"{text[: length // 2]}…{text[len(text) - (length - 1) // 2 :]}"


def per_image_csv(record: EvaluationRecord) -> str:
    """A row per generated image: its set, name, prompt, seed, nearest real image, and all its values.

    If the record has a stamp, every row carries it in a last column.
    """
    stamp = [record.stamp] if record.stamp else []
    # images of different sets may have different values: a column for each, empty where there is none
    value_names: dict[str, None] = {}
    for row in record.images:
        value_names |= dict.fromkeys(row.values)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heading = ["set", "image", "prompt", "seed", "nearest", "nearest_in", *value_names]
    writer.writerow([*heading, "stamp"] if stamp else heading)
    for row in record.images:
        cells = [row.generated, row.name, row.prompt, row.seed, row.nearest, row.nearest_in]
        cells += [row.values.get(name) for name in value_names]
        writer.writerow(cells + stamp)
    return text.getvalue()


def notes_by_name(notes: Sequence[tuple[str, str]]) -> list[str]:
    """List items of notes about scores; names with the same note share an item.

    Args:
        notes: (name, note); empty notes are left out.
    """
    names_by_note: dict[str, list[str]] = {}
    for name, note in notes:
        names = names_by_note.setdefault(note, [])
        if name not in names:
            names.append(name)
    items = []
    for note, names in names_by_note.items():
        if note:
            items.append(f"`{', '.join(names)}`: {note}")
    return list_items(items)


def list_items(texts: Iterable[str]) -> list[str]:
    """The lines, of WIDTH characters, of a list with these items; line breaks in an item become commas."""
    lines: list[str] = []
    for text in texts:
        joined = text.replace(":\n", ": ").replace("\n", ", ")
        lines += textwrap.wrap(
            f"- {_one_line(joined)}",
            WIDTH,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def _escape_cell(text: str) -> str:
    return _one_line(text).replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())
