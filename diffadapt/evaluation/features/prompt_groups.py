"""Images by prompt: their groups, batches of whole prompts, and LPIPS reduced to distances within a prompt.

A row of LPIPS features has 640,000 numbers (AlexNet) to 8 million (VGG16): too many to store for a whole set.
Diversity needs nothing but the distances within each prompt, which a few coordinates per image keep.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

COLUMNS = 1 << 16  # of a row, converted to float64 at a time


def prompt_batches(count: int, batch_size: int, prompts: Sequence[str] = ()) -> list[list[int]]:
    """Positions of images in batches.

    Args:
        count: number of images.
        batch_size: positions in each batch; the last one may have fewer.
        prompts: the prompt of each image. With prompts a batch holds all images of its prompts: at most
            `batch_size` of them, unless one prompt has more.
    """
    batches: list[list[int]] = []
    if not prompts:
        for start in range(0, count, batch_size):
            batches.append(list(range(start, min(start + batch_size, count))))
        return batches
    batches.append([])
    for positions in _positions_by_prompt(prompts):
        if batches[-1] and len(batches[-1]) + len(positions) > batch_size:
            batches.append([])
        batches[-1] += positions
    return batches


def group_numbers(prompts: Iterable[Hashable]) -> Tensor:
    """The number of each image's prompt (or of whatever it is grouped by), (N,).

    Prompts are numbered from 0, in the order of first appearance.
    """
    number_of: dict[Hashable, int] = {}
    numbers = []
    for prompt in prompts:
        numbers.append(number_of.setdefault(prompt, len(number_of)))
    return torch.tensor(numbers)


def coordinates(rows: Tensor, prompts: Sequence[str]) -> Tensor:
    """Coordinates of images with the same distances within each prompt as their features (classical scaling).

    The m images of a prompt have the inner products `G = X X^T`, X their centered features (m, D). With the
    eigendecomposition `G = V diag(e) V^T` the rows of `V diag(sqrt(e))` have the same inner products, hence
    the same distances.

    Args:
        rows: features (B, D).
        prompts: the prompt of each image.

    Returns:
        (B, m) float64, m the images of the largest prompt. A row with NaN or infinity becomes NaN.
    """
    groups = _positions_by_prompt(prompts)
    largest = max(len(positions) for positions in groups)
    result = torch.zeros(len(rows), largest, dtype=torch.float64)
    for positions in groups:
        products = _inner_products(rows[positions])  # (m, m)
        if products.isfinite().all():
            values, vectors = torch.linalg.eigh(products)  # (m,), (m, m)
            # G has no negative eigenvalues but by rounding
            result[positions, : len(positions)] = vectors * values.clamp(min=0).sqrt()
    result[~rows.isfinite().all(dim=1)] = torch.nan
    return result


def concatenate_rows(parts: Sequence[Tensor]) -> Tensor:
    """Rows of several batches; narrower ones (coordinates of smaller prompts) get zeros on the right."""
    width = max(part.shape[1] for part in parts)
    padded = []
    for part in parts:
        padded.append(torch.nn.functional.pad(part, (0, width - part.shape[1])))
    return torch.cat(padded)


def _positions_by_prompt(prompts: Sequence[str]) -> list[list[int]]:
    """The positions of each prompt's images, prompts in the order of first appearance."""
    positions: dict[str, list[int]] = {}
    for position, prompt in enumerate(prompts):
        positions.setdefault(prompt, []).append(position)
    return list(positions.values())


def _inner_products(rows: Tensor) -> Tensor:
    """Inner products (m, m) float64 of rows (m, D) less their mean, which would cost digits."""
    products = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for block in rows.split(COLUMNS, dim=1):
        centered = block.double()
        centered = centered - centered.mean(dim=0)
        products = products + centered @ centered.T
    return products
