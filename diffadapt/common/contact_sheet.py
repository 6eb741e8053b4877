"""Captioned picture grids: contact sheets and before/after comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PAPER, INK, FAINT, ACCENT = "#ffffff", "#1d2433", "#6b7280", "#b4540a"
CELL_SIDE = 192  # pixels a picture should at least have on the sheet
GAP, MARGIN = 10, 28
TITLE, HEADING, CAPTION = 32, 23, 17  # font sizes


@dataclass(frozen=True)
class Panel:
    """A block of pictures under one heading; captions, when given, stand under each picture."""

    heading: str
    pictures: Sequence[Image.Image]
    columns: int
    captions: Sequence[str] = ()


def to_pil_images(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> 8-bit pictures."""
    values = (images * 255).round().to("cpu").byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(value)) for value in values]


def make_contact_sheet(rows: Sequence[Sequence[Panel]], *, title: str, note: str = "") -> Image.Image:
    """Panels side by side in rows, under a title and a smaller note.

    Small pictures are enlarged by whole factors without smoothing: one sees the pixels that were made.
    """
    sheets = [[_panel(panel) for panel in row] for row in rows]
    width = max(sum(s.width for s in row) + MARGIN * (len(row) - 1) for row in sheets) + 2 * MARGIN
    head = _head(title, note, width)
    height = head.height + sum(max(s.height for s in row) + MARGIN for row in sheets)
    page = Image.new("RGB", (width, height), PAPER)
    page.paste(head, (0, 0))
    top = head.height
    for row in sheets:
        left = MARGIN
        for sheet in row:
            page.paste(sheet, (left, top))
            left += sheet.width + MARGIN
        top += max(s.height for s in row) + MARGIN
    return page


def _panel(panel: Panel) -> Image.Image:
    cells = [_enlarged(picture) for picture in panel.pictures]
    side = max(max(cell.size) for cell in cells)
    lines = [_wrapped(caption, side, CAPTION) for caption in panel.captions]
    below = max((len(some) for some in lines), default=0) * (CAPTION + 4) + (4 if lines else 0)
    columns = min(panel.columns, len(cells))
    rows = -(-len(cells) // columns)
    heading = _wrapped(panel.heading, columns * (side + GAP) - GAP, HEADING)
    top = len(heading) * (HEADING + 6) + 6
    sheet = Image.new("RGB", (columns * (side + GAP) - GAP, top + rows * (side + below + GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, line in enumerate(heading):
        pen.text((0, index * (HEADING + 6)), line, fill=INK, font=_font(HEADING))
    for index, cell in enumerate(cells):
        left, upper = index % columns * (side + GAP), top + index // columns * (side + below + GAP)
        sheet.paste(cell, (left, upper))
        pen.rectangle((left, upper, left + side - 1, upper + side - 1), outline="#d8dce3")
        for row, line in enumerate(lines[index] if lines else ()):
            pen.text((left, upper + side + 4 + row * (CAPTION + 4)), line, fill=FAINT, font=_font(CAPTION))
    return sheet


def _head(title: str, note: str, width: int) -> Image.Image:
    titles, notes = (
        _wrapped(title, width - 2 * MARGIN, TITLE),
        _wrapped(note, width - 2 * MARGIN, CAPTION + 2),
    )
    height = MARGIN + len(titles) * (TITLE + 6) + len(notes) * (CAPTION + 8) + MARGIN // 2
    head = Image.new("RGB", (width, height), PAPER)
    pen, top = ImageDraw.Draw(head), MARGIN - 8
    for line in titles:
        pen.text((MARGIN, top), line, fill=INK, font=_font(TITLE))
        top += TITLE + 6
    for line in notes:
        pen.text((MARGIN, top), line, fill=ACCENT, font=_font(CAPTION + 2))
        top += CAPTION + 8
    return head


def _enlarged(picture: Image.Image) -> Image.Image:
    factor = max(1, -(-CELL_SIDE // max(picture.size)) if max(picture.size) < CELL_SIDE else 1)
    if max(picture.size) > 2 * CELL_SIDE:
        picture = picture.copy()
        picture.thumbnail((CELL_SIDE, CELL_SIDE), Image.Resampling.LANCZOS)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _wrapped(text: str, width: int, size: int) -> list[str]:
    """Words in lines that are not wider than `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _font(size).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)
