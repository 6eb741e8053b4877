"""The images that a page shows: the best, the worst, some at random, and those most like a real image."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from diffadapt.evaluation.record import EvaluationRecord, ImageRow
from diffadapt.evaluation.report.tables import number

RANKING = ("realism", "dino", "clip_i", "image_similarity", "clip_t", "text_similarity")  # higher is better
NEAREST = "nearest_similarity"
REFERENCE = "reference"  # the label of the real images where a row does not name their set


@dataclass(frozen=True)
class Cell:
    """Images side by side with one caption: (label of the set, image name) of each, generated first."""

    images: tuple[tuple[str, str], ...]
    caption: str


@dataclass(frozen=True)
class ContactSheet:
    """Cells under a heading; `note` says how they were chosen."""

    heading: str
    note: str
    cells: tuple[Cell, ...]


def contact_sheets(
    record: EvaluationRecord, label: str, *, count: int = 12, seed: int = 0
) -> list[ContactSheet]:
    """The contact sheets of one generated set. No image is both among the best and among the worst.

    Args:
        record: the evaluation.
        label: of the generated set.
        count: most cells of a sheet.
        seed: of the random choice.
    """
    rows = [row for row in record.images if row.generated == label]
    key = ranking_key(rows)
    sheets = []
    if key is not None:
        ranked = [row for row in rows if key in row.values]
        ranked.sort(key=lambda row: -row.values[key])
        num_shown = min(count, len(ranked) // 2)
        if num_shown:
            best = ranked[:num_shown]
            worst = ranked[::-1][:num_shown]
            sheets.append(ContactSheet("Best", f"highest {key}", _single_cells(best, key)))
            sheets.append(ContactSheet("Worst", f"lowest {key}", _single_cells(worst, key)))
    sample = random.Random(seed).sample(rows, min(count, len(rows)))
    if sample:
        sheets.append(ContactSheet("Random", f"chosen with seed {seed}", _single_cells(sample, key)))
    with_nearest = [row for row in rows if row.nearest is not None]
    with_nearest.sort(key=lambda row: -row.values.get(NEAREST, 0.0))
    if with_nearest:
        cells = []
        for row in with_nearest[: count * 2 // 3]:  # a pair takes more room
            cells.append(_pair_cell(row))
        note = "generated left, its nearest real image right"
        sheets.append(ContactSheet("Nearest real images", note, tuple(cells)))
    return sheets


def ranking_key(rows: Sequence[ImageRow]) -> str | None:
    """The value by which images are called best and worst: the first of RANKING that they have."""
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(row.values)
    for metric in RANKING:
        for name in names:
            if name.partition("[")[0] == metric:  # "realism[embedded:clip]"
                return name
    return None


def _single_cells(rows: Sequence[ImageRow], key: str | None) -> tuple[Cell, ...]:
    cells = []
    for row in rows:
        caption = row.prompt or row.name
        if key is not None and key in row.values:
            caption = f"{number(row.values[key])} · {caption}"
        cells.append(Cell(((row.generated, row.name),), caption))
    return tuple(cells)


def _pair_cell(row: ImageRow) -> Cell:
    """A generated image beside its nearest real image."""
    caption = f"{row.name} | {row.nearest}"
    if NEAREST in row.values:
        caption = f"{number(row.values[NEAREST])} · {caption}"
    images = ((row.generated, row.name), (row.nearest_in or REFERENCE, row.nearest))
    return Cell(images, caption)
