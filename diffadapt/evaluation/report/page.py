"""An evaluation as one self-contained HTML file: scores, plots and images; no script, no network."""

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

from matplotlib.figure import Figure
from PIL import Image

from diffadapt.common.atomic_files import write_utf8
from diffadapt.evaluation.record import NOT_A_SCORE, EvaluationRecord, Score
from diffadapt.evaluation.report import plots
from diffadapt.evaluation.report.contact_sheets import (
    NEAREST,
    Cell,
    ContactSheet,
    contact_sheets,
    ranking_key,
)
from diffadapt.evaluation.report.page_style import STYLE
from diffadapt.evaluation.report.tables import (
    COLUMNS,
    columns_with_values,
    remarks_of_run,
    score_notes,
    score_rows,
)

LoadImage = Callable[[str, str], Image.Image]  # (label of a set, image name) -> RGB

MAX_SIDE = 224  # pixels of the longer side of an image on the page
PIXEL_ART_SIDE = 128  # up to here images are stored without loss and enlarged pixel by pixel
STAMPS = {
    NOT_A_SCORE: "the extractor had random weights: these numbers only show that the command runs",
    "DEMO": "embedded images or models: a demonstration, comparable with itself only",
}
CELL_CLASSES = {  # column -> CSS class
    "value": "value",
    "remarks": "remarks",
    "95 % interval": "figure",
    "real against real": "figure",
}
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # nothing is ever fetched


def write_page(record: EvaluationRecord, path: str | Path, load_image: LoadImage) -> list[str]:
    """Writes the page of an evaluation, without what cannot be shown: the scores are stored elsewhere.

    Args:
        record: the evaluation.
        path: of the HTML file; the JSON, Markdown and CSV files are beside it.
        load_image: gives an image of a set by name: of every generated set, and of the real images that
            `record.images` names as nearest. It raises KeyError for sets of which only features are known,
            whose images are left out.

    Returns:
        What is missing on the page and why, or why there is no page.
    """
    problems: list[str] = []
    try:
        text = page(record, load_image, problems, beside=Path(path).stem)
        write_utf8(path, text)
    except Exception as error:  # a page that cannot be made must not cost the scores
        problems.append(f"the page {path} could not be made: {type(error).__name__}: {error}")
    return problems


def page(
    record: EvaluationRecord,
    load_image: LoadImage,
    problems: list[str] | None = None,
    *,
    beside: str | None = None,
) -> str:
    """The HTML document.

    Args:
        record: the evaluation.
        load_image: see `write_page`.
        problems: what could not be shown, and why, is appended.
        beside: name, without suffix, of the JSON, Markdown and CSV files beside the page, to link to them.
    """
    problems = [] if problems is None else problems  # for callers that do not ask
    title = "Evaluation of " + (", ".join(record.labels) or "nothing")
    body = [
        stamp_band(record.stamp),
        f"<main><h1>{escape(title)}</h1>",
        _introduction(record, beside),
        "<h2>Scores</h2>",
        table(COLUMNS, score_rows(record)) if record.scores else "<p>No score could be computed.</p>",
        _notes(record),
        _warnings(record),
        _plots(record, problems),
    ]
    for label in record.labels:
        body.append(_set_images(record, label, load_image, problems))
    body += [_provenance(record), "</main>"]
    return document(f"{record.stamp}: {title}" if record.stamp else title, "\n".join(body))


def document(title: str, body: str) -> str:
    """A whole HTML page in the style of evaluations, which fetches nothing."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def table(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    """A table whose rows become cards on a narrow screen; columns without any value are left out."""
    used_columns = columns_with_values(columns, rows)
    heading = ""
    for column in used_columns:
        heading += f"<th>{escape(column)}</th>"
    lines = [f'<div class="table"><table class="cards"><thead><tr>{heading}</tr></thead><tbody>']
    for row in rows:
        cells = ""
        for column in used_columns:
            cells += _table_cell(column, row.get(column, ""))
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def plot(figure: Figure, description: str) -> str:
    """A matplotlib figure as an image inside the page."""
    return f'<img src="{plots.data_uri(figure)}" alt="{escape(description)}">'


def thumbnail(image: Image.Image) -> tuple[str, bool]:
    """A data URI of an image, which is shrunk where it is large; and whether to show it pixel by pixel."""
    image = image.convert("RGB")  # JPEG has no transparency
    is_small = max(image.size) <= PIXEL_ART_SIDE
    if max(image.size) > MAX_SIDE:
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    if is_small:
        image.save(content, "PNG", optimize=True)
    else:
        image.save(content, "JPEG", quality=88)
    media_type = "image/png" if is_small else "image/jpeg"
    return f"data:{media_type};base64,{base64.b64encode(content.getvalue()).decode()}", is_small


def stamp_band(stamp: str) -> str:
    """The band on top of a page; empty for real scores."""
    return f'<div class="stamp">{stamp} <span>· {STAMPS[stamp]}</span></div>' if stamp else ""


def _table_cell(column: str, text: str) -> str:
    css_class = CELL_CLASSES.get(column, "")  # `data-label` is the heading where rows are cards
    content = escape(text).replace("[", "<wbr>[")  # a long name breaks before its extractor
    return f'<td class="{css_class}" data-label="{escape(column)}">{content}</td>'


def _introduction(record: EvaluationRecord, beside: str | None) -> str:
    """The sets, the extractors, the command, and links to the files beside the page."""
    sets = []
    for label, summary in record.sets.items():
        sets.append(f"{summary.count:,} {summary.role} images of {label}")
    extractors = ", ".join(extractor.name for extractor in record.extractors) or "none"
    parts = [f'<p class="faint">{escape("; ".join(sets))}. Extractors: {escape(extractors)}.</p>']
    if record.settings.get("command"):
        parts.append(f"<p>Made by <code>{escape(str(record.settings['command']))}</code></p>")
    if beside is not None:
        files = {".json": "scores and settings (JSON)", ".md": "table (Markdown)", ".csv": "each image (CSV)"}
        links = []
        for suffix, text in files.items():
            links.append(f'<a href="{escape(quote(beside + suffix))}">{text}</a>')
        parts.append(f"<p>{' · '.join(links)}</p>")
    return "".join(parts)


def _notes(record: EvaluationRecord) -> str:
    """Once for each metric: the meaning of its values, the method of its interval, its paper."""
    items = []
    for name, text in score_notes(record).items():
        if text:
            items.append(f"<li><b>{escape(name)}</b>: {_escape_with_links(text)}</li>")
    return f'<ul class="notes">{"".join(items)}</ul>' if items else ""


def _escape_with_links(text: str) -> str:
    """Escaped text in which arXiv numbers are links."""
    return ARXIV.sub(r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>', escape(text))


def _warnings(record: EvaluationRecord) -> str:
    items = ""
    for line in remarks_of_run(record):
        items += f"<li>{escape(line)}</li>"
    return f'<div class="warnings"><ul>{items}</ul></div>' if items else ""


def _plots(record: EvaluationRecord, problems: list[str]) -> str:
    """The intervals of every score, and the distributions of two values of the images."""
    scores_by_name: dict[str, list[Score]] = {}
    for score in record.scores:
        scores_by_name.setdefault(score.name, []).append(score)
    html = []
    for name, scores in scores_by_name.items():
        make_figure = partial(plots.interval_plot, scores)
        html.append(_plot_if_possible(make_figure, f"{name} of every set", problems))
    key = ranking_key(record.images)
    for name in dict.fromkeys((key, NEAREST)):  # each once
        values = {} if name is None else _image_values(record, name)
        if values:
            make_figure = partial(plots.histogram, values, name)
            html.append(_plot_if_possible(make_figure, f"{name} of each image", problems))
    if not html:
        return ""
    note = "Dots: values; bars: 95 % intervals; broken line: real against real, what real images get."
    return f'<h2>Plots</h2><p class="faint">{note}</p><div class="plots">{"".join(html)}</div>'


def _image_values(record: EvaluationRecord, name: str) -> dict[str, list[float]]:
    """Label of a set -> the values of its images that have one; sets without any are left out."""
    values: dict[str, list[float]] = {}
    for label in record.labels:
        for row in record.images:
            if row.generated == label and name in row.values:
                values.setdefault(label, []).append(row.values[name])
    return values


def _plot_if_possible(make_figure: Callable[[], Figure], description: str, problems: list[str]) -> str:
    try:
        return plot(make_figure(), description)
    except Exception as error:  # matplotlib raises nearly anything; the other plots are still shown
        problems.append(f"the page lacks the plot of {description}: {type(error).__name__}: {error}")
        return f"<p>The plot of {escape(description)} could not be made.</p>"


def _set_images(record: EvaluationRecord, label: str, load_image: LoadImage, problems: list[str]) -> str:
    """The contact sheets of one set."""
    sheets = []
    for contact_sheet in contact_sheets(record, label):
        html = _sheet_html(contact_sheet, load_image, problems)
        if html:
            sheets.append(html)
    return "\n".join([f"<h2>Images of {escape(label)}</h2>", *sheets]) if sheets else ""


def _sheet_html(sheet: ContactSheet, load_image: LoadImage, problems: list[str]) -> str:
    cells = ""
    has_pairs = False
    for cell in sheet.cells:
        cells += _cell_html(cell, load_image, problems)
        has_pairs = has_pairs or len(cell.images) > 1
    if not cells:  # no image of it can be shown
        return ""
    heading = f'<h3>{escape(sheet.heading)}</h3><p class="faint">{escape(sheet.note)}</p>'
    return f'{heading}<div class="sheet{" pairs" if has_pairs else ""}">{cells}</div>'


def _cell_html(cell: Cell, load_image: LoadImage, problems: list[str]) -> str:
    images = ""
    for label, name in cell.images:
        images += _image_html(label, name, load_image, problems)
    caption = f"<figcaption>{escape(cell.caption)}</figcaption>"
    return f'<figure><div class="images">{images}</div>{caption}</figure>' if images else ""


def _image_html(label: str, name: str, load_image: LoadImage, problems: list[str]) -> str:
    """One image, inside the page; nothing where it cannot be shown."""
    try:
        uri, is_small = thumbnail(load_image(label, name))
    except KeyError:  # only features of this set are known
        return ""
    except Exception as error:  # removed or damaged since it was scored; Pillow raises almost anything
        line = f"the page lacks the image {name} of {label}: {error}"
        if line not in problems:  # an image may be on several sheets
            problems.append(line)
        return ""
    css_class = ' class="small"' if is_small else ""
    return f'<img{css_class} src="{uri}" alt="{escape(f"{label}: {name}")}">'


def _provenance(record: EvaluationRecord) -> str:
    """Sets, extractors, settings, seeds and versions: what one needs to compute the numbers again."""
    blocks: dict[str, Mapping[str, object]] = {}
    for label, summary in record.sets.items():
        blocks[f"Set: {label} ({summary.role})"] = vars(summary)
    for extractor in record.extractors:
        blocks[f"Extractor: {extractor.name}"] = vars(extractor)
    blocks |= {"Settings": record.settings, "Seeds": record.seeds, "Versions": record.versions}
    html = "<h2>How it was made</h2>"
    for heading, values in blocks.items():
        if values:
            content = _definition_list(values)
            html += f"<details open><summary>{escape(heading)}</summary>{content}</details>"
    return html


def _definition_list(values: Mapping[str, object]) -> str:
    """Names and values; empty values are left out."""
    items = ""
    for name, value in values.items():
        if value not in (None, "", (), [], {}):
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            items += f"<dt>{escape(str(name))}</dt><dd>{escape(text)}</dd>"
    return f"<dl>{items}</dl>"
