"""Distances between the rows of two matrices, a block at a time, with the decisions of float64.

A product in float32, |a|^2 + |b|^2 - 2 a.b, decides almost every comparison; pairs too near to call are
measured again, directly and in float64: |a - b|, which is exact for equal rows and the same in both
directions.
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
    """Rows about a common centre, which keeps |a|^2 + |b|^2 - 2 a.b from cancelling.

    Attributes:
        exact: (N, D), float32 or float64, the rows themselves; near ties are measured between these.
        squares: (N,) float32, squared norms of the centred rows.
    """

    def __init__(self, exact: Tensor, centre: Tensor):
        self.exact = exact if exact.dtype in (torch.float32, torch.float64) else exact.float()
        self.centre = centre.to(self.exact.dtype)
        squares = []
        for start in range(0, len(exact), COLUMNS):
            squares.append(self.centred(start, start + COLUMNS).square().sum(dim=1))
        self.squares = torch.cat(squares)

    def __len__(self) -> int:
        return len(self.exact)

    def centred(self, start: int, stop: int) -> Tensor:
        """Centred rows in float32, computed on every call: a second copy of the features is not kept."""
        return (self.exact[start:stop] - self.centre).float()


def prepare(*sets: Tensor) -> list[Points]:
    """Points of several sets (N, D) about their common mean."""
    total = 0
    for matrix in sets:
        for rows in matrix.split(ROWS):
            total = total + rows.double().sum(dim=0)  # (D,)
    centre = total / sum(len(matrix) for matrix in sets)
    return [Points(matrix, centre) for matrix in sets]


class Block(NamedTuple):
    """Rows of the matrix of squared distances, float32.

    Attributes:
        rows: which of the queries.
        squared: squared distances to all points, (b, N).
        bound: of each entry's error, (b, N).
    """

    rows: slice
    squared: Tensor
    bound: Tensor


def squared_blocks(queries: Points, points: Points) -> Iterator[Block]:
    """The matrix of squared distances, block by block; a block is overwritten by the next one.

    The bound is 4 sqrt(D) roundings of |a|^2 + |b|^2: the error of a sum of D products, with room.
    """
    unit = 4 * torch.finfo(torch.float32).eps * max(queries.exact.shape[1], 16) ** 0.5
    size = (min(ROWS, len(queries)), len(points))
    memory = points.squares.new_empty(2, *size)  # reused by all blocks, which keeps it from fragmenting
    for start in range(0, len(queries), ROWS):
        rows = slice(start, min(start + ROWS, len(queries)))
        squared, bound = memory[:, : rows.stop - rows.start]
        torch.add(queries.squares[rows, None], points.squares, out=squared)
        torch.mul(squared, unit, out=bound)
        centred_queries = queries.centred(rows.start, rows.stop)  # (b, D)
        for first in range(0, len(points), COLUMNS):
            last = first + COLUMNS
            squared[:, first:last].addmm_(centred_queries, points.centred(first, last).T, alpha=-2)
        yield Block(rows, squared, bound)


def measure(queries: Points, points: Points, rows: Tensor, columns: Tensor) -> Tensor:
    """Distances of single pairs in float64.

    Args:
        rows, columns: (P,) numbers of the pairs' queries and points.

    Returns:
        (P,).
    """
    distances = []
    for i, j in zip(rows.split(PAIRS), columns.split(PAIRS), strict=True):
        difference = queries.exact[i].double() - points.exact[j].double()
        distances.append(torch.linalg.vector_norm(difference, dim=1))
    if not distances:
        return torch.empty(0, dtype=torch.float64, device=rows.device)
    return torch.cat(distances)


def nearest(points: Points, k: int) -> tuple[Tensor, Tensor]:
    """Distances (N, k), float64, ascending, and row numbers (N, k) of each point's k nearest others.

    Float32 proposes a few candidates more than k; where its error bound leaves open whether another point is
    nearer, all distances of that row are measured in float64.

    Raises:
        ValueError: there are no k others.
    """
    if not 1 <= k < len(points):
        raise ValueError(f"{k} nearest neighbours need more than {k} images, got {len(points)}")
    distances = []
    indices = []
    count = min(k + SPARE, len(points) - 1)
    has_other_points = count < len(points) - 1
    for block in squared_blocks(points, points):
        start = block.rows.start
        lower_bounds = block.squared.sub_(block.bound)  # (b, N)
        lower_bounds.diagonal(start).fill_(torch.inf)  # no point is its own neighbour
        limits, columns = lower_bounds.topk(count, dim=1, largest=False)  # (b, count)
        rows = torch.arange(start, block.rows.stop, device=columns.device).repeat_interleave(count)
        exact, order = measure(points, points, rows, columns.flatten()).view(-1, count).sort(dim=1)
        exact = exact[:, :k].clone()
        columns = columns.gather(1, order)[:, :k]
        if has_other_points:
            is_unsure = limits[:, -1] < exact[:, -1].square()
            for row in is_unsure.nonzero().flatten().tolist():
                exact[row], columns[row] = _nearest_of_row(points, start + row, k)
        distances.append(exact)
        indices.append(columns)
    return torch.cat(distances), torch.cat(indices)


def _nearest_of_row(points: Points, row: int, k: int) -> tuple[Tensor, Tensor]:
    """Distances and row numbers of the k nearest others of one point, (k,), all measured in float64."""
    columns = torch.arange(len(points), device=points.exact.device)
    distances = measure(points, points, torch.full_like(columns, row), columns)
    distances[row] = torch.inf
    return distances.topk(k, largest=False, sorted=True)
