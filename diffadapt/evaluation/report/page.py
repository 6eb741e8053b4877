"""An evaluation as one self-contained HTML file: figures, plots and images; no script, no network."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from diffadapt.common.atomic_files import write_utf8
from diffadapt.evaluation.record import NOT_A_SCORE, EvaluationRecord
from diffadapt.evaluation.report import plots
from diffadapt.evaluation.report.contact_sheets import NEAREST, Cell, Sheet, ranking_key, sheets
from diffadapt.evaluation.report.page_style import STYLE
from diffadapt.evaluation.report.tables import COLUMNS, remarks_of_run, score_notes, score_rows

Picture = Callable[[str, str], Image.Image]  # (label of a set, image name) -> RGB

THUMBNAIL = 224  # pixels of the longer side of an image on the page, at most
SMALL = 128  # up to here images are kept pixel by pixel
STAMPS = {
    NOT_A_SCORE: "the extractor had random weights: these numbers only show that the command runs",
    "DEMO": "embedded images or models: a demonstration, comparable with itself only",
}
CLASSES = {"value": "value", "remarks": "remarks", "95 % interval": "figure", "real against real": "figure"}
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # nothing is ever fetched


def write_page(record: EvaluationRecord, path: str | Path, picture: Picture) -> list[str]:
    """Writes the page of an evaluation. What cannot be shown is left out: the scores are kept elsewhere.

    Args:
        picture: the image of a name in a set: of every generated set, and of the real images that
            `record.images` names as nearest. KeyError where only features are at hand: then it is left out.

    Returns: what is missing on the page, or that there is none, and why.
    """
    problems: list[str] = []
    try:
        text = page(record, picture, problems, beside=Path(path).stem)
        write_utf8(path, text)
    except Exception as error:  # a page that cannot be made must not cost the scores
        problems.append(f"the page {path} could not be made: {type(error).__name__}: {error}")
    return problems


def page(
    record: EvaluationRecord,
    picture: Picture,
    problems: list[str] | None = None,
    *,
    beside: str | None = None,
) -> str:
    """The HTML document.

    Args:
        problems: is extended by what could not be shown, and why.
        beside: name, without ending, of the JSON, Markdown and CSV files beside the page, to link to them.
    """
    problems = [] if problems is None else problems
    title = "Evaluation of " + (", ".join(record.labels) or "nothing")
    body = [
        stamp_of(record.stamp),
        f"<main><h1>{escape(title)}</h1>",
        _introduction(record, beside),
        "<h2>Scores</h2>",
        table(COLUMNS, score_rows(record)) if record.scores else "<p>No score could be computed.</p>",
        _notes(record),
        _warnings(record),
        _plots(record, problems),
        *(_images(record, label, picture, problems) for label in record.labels),
        _making(record),
        "</main>",
    ]
    return document(f"{record.stamp}: {title}" if record.stamp else title, "\n".join(body))


def document(title: str, body: str) -> str:
    """A whole page in the suite's style, which fetches nothing."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def table(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    """A table whose rows become cards on a narrow screen; columns without any value are left out."""
    used = [column for column in columns if any(row.get(column) for row in rows)]
    head = "".join(f"<th>{escape(column)}</th>" for column in used)
    lines = [f'<div class="table"><table class="cards"><thead><tr>{head}</tr></thead><tbody>']
    for row in rows:
        cells = (_table_cell(column, row.get(column, "")) for column in used)
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def _table_cell(column: str, text: str) -> str:
    css = CLASSES.get(column, "")
    content = escape(text).replace("[", "<wbr>[")  # a long name breaks before its extractor
    return f'<td class="{css}" data-label="{escape(column)}">{content}</td>'


def plot(figure: plots.Figure, description: str) -> str:
    """A figure as an image inside the page."""
    return f'<img src="{plots.data_uri(figure)}" alt="{escape(description)}">'


def thumbnail(image: Image.Image) -> tuple[str, bool]:
    """A data URI of an image, made smaller where it is large; and whether to show it pixel by pixel."""
    image = image.convert("RGB")
    small = max(image.size) <= SMALL
    if max(image.size) > THUMBNAIL:
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    content, kind = io.BytesIO(), "PNG" if small else "JPEG"
    image.save(content, kind, **({"optimize": True} if small else {"quality": 88}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}", small


def stamp_of(stamp: str) -> str:
    """The band on top of a page; empty for real scores."""
    return f'<div class="stamp">{stamp} <span>· {STAMPS[stamp]}</span></div>' if stamp else ""


def _introduction(record: EvaluationRecord, beside: str | None) -> str:
    sets = [f"{summary.count:,} {summary.role} images of {label}" for label, summary in record.sets.items()]
    extractors = ", ".join(extractor.name for extractor in record.extractors) or "none"
    parts = [f'<p class="faint">{escape("; ".join(sets))}. Extractors: {escape(extractors)}.</p>']
    if record.settings.get("command"):
        parts.append(f"<p>Made by <code>{escape(str(record.settings['command']))}</code></p>")
    if beside is not None:
        kinds = {".json": "scores and settings (JSON)", ".md": "table (Markdown)", ".csv": "each image (CSV)"}
        links = [f'<a href="{escape(quote(beside + end))}">{text}</a>' for end, text in kinds.items()]
        parts.append(f"<p>{' · '.join(links)}</p>")
    return "".join(parts)


def _notes(record: EvaluationRecord) -> str:
    """Once for each metric: what its values mean, the method of its interval, its paper."""
    notes = {name: text for name, text in score_notes(record).items() if text}
    items = (f"<li><b>{escape(name)}</b>: {_linked(text)}</li>" for name, text in notes.items())
    return f'<ul class="notes">{"".join(items)}</ul>' if notes else ""


def _linked(text: str) -> str:
    """Escaped text in which arXiv numbers are links."""
    return ARXIV.sub(r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>', escape(text))


def _warnings(record: EvaluationRecord) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in remarks_of_run(record))
    return f'<div class="warnings"><ul>{items}</ul></div>' if items else ""


def _plots(record: EvaluationRecord, problems: list[str]) -> str:
    by_name: dict[str, list] = {}
    for score in record.scores:
        by_name.setdefault(score.name, []).append(score)
    shown = []
    for name, scores in by_name.items():
        make = partial(plots.interval_plot, scores)
        shown.append(_plot_if_possible(make, f"{name} of every set", problems))
    key = ranking_key(list(record.images))
    for name in dict.fromkeys(name for name in (key, NEAREST) if name is not None):
        values = {
            label: [r.values[name] for r in record.images if r.generated == label and name in r.values]
            for label in record.labels
        }
        values = {label: own for label, own in values.items() if own}
        if values:
            make = partial(plots.histogram, values, name)
            shown.append(_plot_if_possible(make, f"{name} of each image", problems))
    note = "Dots: values; bars: 95 % intervals; broken line: real against real, what real images get."
    text = f'<p class="faint">{note}</p><div class="plots">{"".join(shown)}</div>'
    return f"<h2>Plots</h2>{text}" if any(shown) else ""


def _plot_if_possible(make: Callable[[], plots.Figure], description: str, problems: list[str]) -> str:
    try:
        return plot(make(), description)
    except Exception as error:  # matplotlib raises nearly anything; one plot costs itself only
        problems.append(f"the page lacks the plot of {description}: {type(error).__name__}: {error}")
        return f"<p>The plot of {escape(description)} could not be made.</p>"


def _images(record: EvaluationRecord, label: str, picture: Picture, problems: list[str]) -> str:
    shown = [html for sheet in sheets(record, label) if (html := _sheet(sheet, picture, problems))]
    return "\n".join([f"<h2>Images of {escape(label)}</h2>", *shown]) if shown else ""


def _sheet(sheet: Sheet, picture: Picture, problems: list[str]) -> str:
    cells = "".join(_cell(cell, picture, problems) for cell in sheet.cells)
    if not cells:
        return ""
    pairs = any(len(cell.images) > 1 for cell in sheet.cells)
    head = f'<h3>{escape(sheet.heading)}</h3><p class="faint">{escape(sheet.note)}</p>'
    return f'{head}<div class="sheet{" pairs" if pairs else ""}">{cells}</div>'


def _cell(cell: Cell, picture: Picture, problems: list[str]) -> str:
    images = "".join(_image(label, name, picture, problems) for label, name in cell.images)
    caption = f"<figcaption>{escape(cell.caption)}</figcaption>"
    return f'<figure><div class="images">{images}</div>{caption}</figure>' if images else ""


def _image(label: str, name: str, picture: Picture, problems: list[str]) -> str:
    try:
        uri, small = thumbnail(picture(label, name))
    except KeyError:  # of this set only features are at hand
        return ""
    except Exception as error:  # removed or damaged since it was scored; Pillow raises almost anything
        line = f"the page lacks the image {name} of {label}: {error}"
        if line not in problems:
            problems.append(line)
        return ""
    css = ' class="small"' if small else ""
    return f'<img{css} src="{uri}" alt="{escape(f"{label}: {name}")}">'


def _making(record: EvaluationRecord) -> str:
    """Sets, extractors, settings, seeds and versions: what one needs to make the numbers again."""
    blocks = {
        **{f"Set: {label} ({summary.role})": vars(summary) for label, summary in record.sets.items()},
        **{f"Extractor: {extractor.name}": vars(extractor) for extractor in record.extractors},
        "Settings": record.settings,
        "Seeds": record.seeds,
        "Versions": record.versions,
    }
    parts = [
        f"<details open><summary>{escape(name)}</summary>{_facts(values)}</details>"
        for name, values in blocks.items()
        if values
    ]
    return "<h2>How it was made</h2>" + "".join(parts)


def _facts(values: Mapping[str, object]) -> str:
    shown = {str(name): value for name, value in values.items() if value not in (None, "", (), [], {})}
    items = (f"<dt>{escape(name)}</dt><dd>{escape(_fact(value))}</dd>" for name, value in shown.items())
    return f"<dl>{''.join(items)}</dl>"


def _fact(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
