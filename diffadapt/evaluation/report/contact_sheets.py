"""Which images of an evaluation are shown: the best, the worst, some at random, and those like a real one."""

from __future__ import annotations

import random
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
class Sheet:
    """Cells under a heading; `note` says how they were chosen."""

    heading: str
    note: str
    cells: tuple[Cell, ...]


def sheets(record: EvaluationRecord, label: str, *, count: int = 12, seed: int = 0) -> list[Sheet]:
    """The contact sheets of one generated set, at most `count` cells each; no image is best and worst."""
    rows = [row for row in record.images if row.generated == label]
    found, key = [], ranking_key(rows)
    if key is not None:
        ranked = sorted((row for row in rows if key in row.values), key=lambda row: -row.values[key])
        shown = min(count, len(ranked) // 2)
        if shown:
            found += [
                Sheet("Best", f"highest {key}", tuple(_single(row, key) for row in ranked[:shown])),
                Sheet(
                    "Worst", f"lowest {key}", tuple(_single(row, key) for row in ranked[: -shown - 1 : -1])
                ),
            ]
    chosen = random.Random(seed).sample(rows, min(count, len(rows)))
    if chosen:
        found.append(Sheet("Random", f"chosen with seed {seed}", tuple(_single(row, key) for row in chosen)))
    near = [row for row in rows if row.nearest is not None]
    near.sort(key=lambda row: -row.values.get(NEAREST, 0.0))
    if near:
        pairs = tuple(_pair(row) for row in near[: count * 2 // 3])
        found.append(Sheet("Nearest real images", "generated left, its nearest real image right", pairs))
    return found


def ranking_key(rows: list[ImageRow]) -> str | None:
    """The figure by which images are called best and worst: the first of RANKING that they have."""
    present = dict.fromkeys(name for row in rows for name in row.values)
    return next((name for wanted in RANKING for name in present if name.partition("[")[0] == wanted), None)


def _single(row: ImageRow, key: str | None) -> Cell:
    figure = "" if key is None or key not in row.values else f"{number(row.values[key])} · "
    return Cell(((row.generated, row.name),), figure + (row.prompt or row.name))


def _pair(row: ImageRow) -> Cell:
    real = (row.nearest_in or REFERENCE, row.nearest)
    figure = f"{number(row.values[NEAREST])} · " if NEAREST in row.values else ""
    return Cell(((row.generated, row.name), real), f"{figure}{row.name} | {row.nearest}")
