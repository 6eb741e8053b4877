"""Distances between the rows of two matrices, a block at a time, with the decisions of float64.

A product in float32 sorts out almost every pair; those too near to call are measured again, directly and in
float64: |a - b|, which is exact for equal rows and the same in both directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 128  # rows of the matrix of distances held at a time
COLUMNS = 2048  # points centred at a time
PAIRS = 512  # pairs measured again at a time
SPARE = 4  # candidates beyond the k nearest, so that float32's mistakes of order fall among them


class Points:
    """Rows prepared for distances about a common centre, which keeps |a|^2 + |b|^2 - 2 a.b from cancelling.

    Attributes:
        exact: (N, D) the given rows, float32 or float64; near ties are measured between these, in float64.
        squares: (N,) float32, squared norms of the centred rows.
    """

    def __init__(self, exact: Tensor, centre: Tensor):
        self.exact = exact if exact.dtype in (torch.float32, torch.float64) else exact.float()
        self.centre = centre.to(self.exact.dtype)
        blocks = range(0, len(exact), COLUMNS)
        self.squares = torch.cat([self.centred(i, i + COLUMNS).square().sum(dim=1) for i in blocks])

    def __len__(self) -> int:
        return len(self.exact)

    def centred(self, start: int, stop: int) -> Tensor:
        """Some centred rows in float32, formed anew each time: a second copy of the features is not kept."""
        return (self.exact[start:stop] - self.centre).float()


def prepare(*sets: Tensor) -> list[Points]:
    """Points of several sets about their common mean."""
    total = sum(rows.double().sum(dim=0) for matrix in sets for rows in matrix.split(ROWS))
    centre = total / sum(len(matrix) for matrix in sets)
    return [Points(matrix, centre) for matrix in sets]


class Block(NamedTuple):
    """Some rows of the matrix of squared distances, float32 (b, N), and the bound of each entry's error."""

    rows: slice
    squared: Tensor
    bound: Tensor


def squared_blocks(queries: Points, points: Points) -> Iterator[Block]:
    """The matrix of squared distances, block by block; a block is overwritten by the next one.

    The bound is 4 sqrt(D) roundings of |a|^2 + |b|^2: what a sum of D products errs by, with room.
    """
    unit = 4 * torch.finfo(torch.float32).eps * max(queries.exact.shape[1], 16) ** 0.5
    size = (min(ROWS, len(queries)), len(points))
    memory = points.squares.new_empty(2, *size)  # of all blocks in turn: a new one each time fragments it
    for start in range(0, len(queries), ROWS):
        rows = slice(start, min(start + ROWS, len(queries)))
        squared, bound = memory[:, : rows.stop - rows.start]
        torch.add(queries.squares[rows, None], points.squares, out=squared)
        torch.mul(squared, unit, out=bound)
        own = queries.centred(rows.start, rows.stop)
        for first in range(0, len(points), COLUMNS):
            last = first + COLUMNS
            squared[:, first:last].addmm_(own, points.centred(first, last).T, alpha=-2)
        yield Block(rows, squared, bound)


def measure(queries: Points, points: Points, rows: Tensor, columns: Tensor) -> Tensor:
    """Distances of single pairs in float64."""
    found = []
    for i, j in zip(rows.split(PAIRS), columns.split(PAIRS), strict=True):
        found.append(torch.linalg.vector_norm(queries.exact[i].double() - points.exact[j].double(), dim=1))
    return torch.cat(found) if found else torch.empty(0, dtype=torch.float64, device=rows.device)


def nearest(points: Points, k: int) -> tuple[Tensor, Tensor]:
    """Distances (N, k), float64, ascending, and row numbers of each point's k nearest others.

    Raises: ValueError when there are no k others.
    """
    if not 1 <= k < len(points):
        raise ValueError(f"{k} nearest neighbours need more than {k} images, got {len(points)}")
    distances, indices = [], []
    count = min(k + SPARE, len(points) - 1)
    for block in squared_blocks(points, points):
        lower, (start, stop) = block.squared.sub_(block.bound), (block.rows.start, block.rows.stop)
        lower.diagonal(start).fill_(torch.inf)
        limits, columns = lower.topk(count, dim=1, largest=False)
        rows = torch.arange(start, stop, device=columns.device).repeat_interleave(count)
        exact, order = measure(points, points, rows, columns.flatten()).view(-1, count).sort(dim=1)
        exact, columns = exact[:, :k].clone(), columns.gather(1, order)[:, :k]
        unsure = (
            limits[:, -1] < exact[:, -1].square() if count < len(points) - 1 else limits[:, -1] < -torch.inf
        )
        for row in unsure.nonzero().flatten().tolist():
            exact[row], columns[row] = _nearest_of_row(points, start + row, k)
        distances.append(exact)
        indices.append(columns)
    return torch.cat(distances), torch.cat(indices)


def _nearest_of_row(points: Points, row: int, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest others of one point, every distance in float64."""
    everything = torch.arange(len(points), device=points.exact.device)
    distances = measure(points, points, torch.full_like(everything, row), everything)
    distances[row] = torch.inf
    return distances.topk(k, largest=False, sorted=True)
