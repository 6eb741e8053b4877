"""Images of one prompt together: where only distances among them count, nothing else of them is kept.

A row of LPIPS features has 640,000 numbers (AlexNet) to 8 million (VGG16): those of a whole set fit nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COLUMNS = 1 << 16  # numbers of a row in float64 at a time


def batches_of(count: int, size: int, groups: Sequence[str] = ()) -> list[list[int]]:
    """Positions of images in whole batches of `size`, the last one smaller.

    Args:
        groups: the prompt of each image; then a batch holds all images of its prompts, at most `size` of them
            unless one prompt has more.
    """
    if not groups:
        return [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    members: dict[str, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    batches: list[list[int]] = [[]]
    for positions in members.values():
        if batches[-1] and len(batches[-1]) + len(positions) > size:
            batches.append([])
        batches[-1] += positions
    return batches


def coordinates(rows: Tensor, groups: Sequence[str]) -> Tensor:
    """(B, D) rows to (B, m) float64, m the size of the largest group: the same distances within each group.

    The eigenvectors of the group's inner products, each by the root of its eigenvalue (classical scaling).
    A row with NaN or infinity becomes NaN.
    """
    members = [[row for row, other in enumerate(groups) if other == group] for group in dict.fromkeys(groups)]
    found = torch.zeros(len(rows), max(map(len, members)), dtype=torch.float64)
    for own in members:
        products = _inner_products(rows[own])
        if products.isfinite().all():
            values, vectors = torch.linalg.eigh(products)
            found[own, : len(own)] = vectors * values.clamp(min=0).sqrt()
    found[~rows.isfinite().all(dim=1)] = torch.nan
    return found


def _inner_products(rows: Tensor) -> Tensor:
    """(m, m) float64, of the rows less their mean: what they share would cost digits."""
    parts = ((part - part.mean(dim=0)) for part in (block.double() for block in rows.split(COLUMNS, dim=1)))
    return sum(part @ part.T for part in parts)


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Rows of several batches; coordinates of smaller groups get zeros on the right."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])
