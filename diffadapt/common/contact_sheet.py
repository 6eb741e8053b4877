"""Contact sheets: grids of images with headings and captions, for samples and before/after comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PAPER = "#ffffff"
INK = "#1d2433"
FAINT = "#6b7280"
ACCENT = "#b4540a"
FRAME = "#d8dce3"

# Lengths in pixels.
CELL_SIDE = 192  # longer side of an image on the sheet, at least
GAP = 10  # between images
MARGIN = 28  # between panels and around the sheet
# Font sizes.
TITLE = 32
HEADING = 23
NOTE = 19
CAPTION = 17
# Distances from one line of text to the next.
TITLE_LINE = TITLE + 6
HEADING_LINE = HEADING + 6
NOTE_LINE = CAPTION + 8
CAPTION_LINE = CAPTION + 4


@dataclass(frozen=True)
class Panel:
    """A block of images under one heading.

    Attributes:
        heading: the text above the block.
        images: the images, in rows.
        columns: the number of images in a row.
        captions: the text below each image; empty for none.
    """

    heading: str
    images: Sequence[Image.Image]
    columns: int
    captions: Sequence[str] = ()


def to_pil_images(images: Tensor) -> list[Image.Image]:
    """8-bit images from a tensor (B, 3, H, W) in [0, 1]."""
    values = (images * 255).round().to("cpu").byte().permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
    return [Image.fromarray(np.ascontiguousarray(value)) for value in values]


def make_contact_sheet(rows: Sequence[Sequence[Panel]], *, title: str, note: str = "") -> Image.Image:
    """Draws rows of panels side by side, under a title and a smaller note.

    Small images are enlarged by integer factors without smoothing, so that the generated pixels stay visible.
    """
    drawn_rows: list[list[Image.Image]] = []
    row_widths = []
    row_heights = []
    for row in rows:
        drawn_panels = [_draw_panel(panel) for panel in row]
        row_width = MARGIN * (len(row) - 1)
        row_height = 0
        for panel in drawn_panels:
            row_width += panel.width
            row_height = max(row_height, panel.height)
        drawn_rows.append(drawn_panels)
        row_widths.append(row_width)
        row_heights.append(row_height + MARGIN)
    width = max(row_widths) + 2 * MARGIN
    head = _draw_head(title, note, width)
    page = Image.new("RGB", (width, head.height + sum(row_heights)), PAPER)
    page.paste(head, (0, 0))
    y = head.height
    for drawn_panels, row_height in zip(drawn_rows, row_heights, strict=True):
        x = MARGIN
        for panel in drawn_panels:
            page.paste(panel, (x, y))
            x += panel.width + MARGIN
        y += row_height
    return page


def _draw_panel(panel: Panel) -> Image.Image:
    """The heading above a grid of square cells, each with an image and its caption."""
    cells = []
    side = 0  # of every cell: the longest side of any image
    for image in panel.images:
        cell = _fit_cell(image)
        cells.append(cell)
        side = max(side, *cell.size)
    captions = []
    caption_lines = 0  # room below every cell: the lines of the longest caption
    for caption in panel.captions:
        lines = _wrap(caption, side, CAPTION)
        captions.append(lines)
        caption_lines = max(caption_lines, len(lines))
    caption_height = caption_lines * CAPTION_LINE + 4 if captions else 0
    columns = min(panel.columns, len(cells))
    row_count = -(-len(cells) // columns)  # rounded up
    width = columns * (side + GAP) - GAP
    heading = _wrap(panel.heading, width, HEADING)
    heading_height = len(heading) * HEADING_LINE + 6
    row_height = side + caption_height + GAP
    sheet = Image.new("RGB", (width, heading_height + row_count * row_height), PAPER)
    pen = ImageDraw.Draw(sheet)
    _draw_lines(pen, heading, x=0, y=0, color=INK, size=HEADING, line_height=HEADING_LINE)
    for index, cell in enumerate(cells):
        row, column = divmod(index, columns)
        x = column * (side + GAP)
        y = heading_height + row * row_height
        sheet.paste(cell, (x, y))
        pen.rectangle((x, y, x + side - 1, y + side - 1), outline=FRAME)
        lines = captions[index] if captions else []
        caption_y = y + side + 4
        _draw_lines(pen, lines, x=x, y=caption_y, color=FAINT, size=CAPTION, line_height=CAPTION_LINE)
    return sheet


def _draw_head(title: str, note: str, width: int) -> Image.Image:
    """The title and the note of a sheet of `width` pixels."""
    titles = _wrap(title, width - 2 * MARGIN, TITLE)
    notes = _wrap(note, width - 2 * MARGIN, NOTE)
    height = MARGIN + len(titles) * TITLE_LINE + len(notes) * NOTE_LINE + MARGIN // 2
    head = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(head)
    y = MARGIN - 8  # a font leaves room above its capitals
    _draw_lines(pen, titles, x=MARGIN, y=y, color=INK, size=TITLE, line_height=TITLE_LINE)
    y += len(titles) * TITLE_LINE
    _draw_lines(pen, notes, x=MARGIN, y=y, color=ACCENT, size=NOTE, line_height=NOTE_LINE)
    return head


def _draw_lines(
    pen: ImageDraw.ImageDraw,
    lines: Sequence[str],
    *,
    x: int,
    y: int,
    color: str,
    size: int,
    line_height: int,
) -> None:
    """Draws lines of text whose upper left corner is (x, y)."""
    for number, line in enumerate(lines):
        pen.text((x, y + number * line_height), line, fill=color, font=_font(size))


def _fit_cell(image: Image.Image) -> Image.Image:
    """The image enlarged to at least CELL_SIDE by an integer factor; if more than twice as large, reduced."""
    longer_side = max(image.size)
    if longer_side > 2 * CELL_SIDE:
        image = image.copy()
        image.thumbnail((CELL_SIDE, CELL_SIDE), Image.Resampling.LANCZOS)
        longer_side = CELL_SIDE
    factor = max(1, -(-CELL_SIDE // longer_side))  # rounded up
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _wrap(text: str, width: int, size: int) -> list[str]:
    """The words of a text in lines of at most `width` pixels; a longer word has a line of its own."""
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
