"""Folds: how a few trained tensors make the entries of a group (SuperLoRA, arXiv 2403.11887, appendix A.2).

A group's entries are the rows, one behind the other, of a matrix or of a tensor with equal sides; surplus
entries are dropped. Every fold but the plain vector is a product of two factors over a split of its axes, so
any run of entries follows from the rows of the first factor that it touches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.methods.base import Shapes
from diffadapt.methods.random_init import draw_normal, draw_orthonormal, draw_uniform

MOST_PADDED = 8  # sides of the dense Kronecker factors, as a multiple of the shortest side they are cut to


@dataclass(frozen=True)
class Fold:
    """One group's trained tensors, and what they make.

        one axis:   vector                                         (entries,)
        two axes:   left0 (x) left1 (x) ... (x) (up @ down)        (rows, columns)
        more axes:  core x1 factor0 x2 factor1 x3 ...              (d, ..., d)

    Attributes:
        entries: number of entries of the fold that are used.
        axes: `(entries,)`: a trained vector; `(rows, columns)`: low rank, or a Kronecker product whose last
            factor is low rank; `(d, ..., d)`: a Tucker or CP decomposition.
        rank: rank of the low-rank factors.
        core: `tucker` trains a core for three axes or more, `cp` has none.
        num_dense: number of dense factors of the Kronecker product before the low-rank one.
        dense_size: rows, and columns, of each dense factor.
    """

    entries: int
    axes: tuple[int, ...]
    rank: int = 1
    core: str = "tucker"
    num_dense: int = 0
    dense_size: int = 1

    def __post_init__(self) -> None:
        if self.dense_product_size > MOST_PADDED * min(self.axes):
            raise ValueError(
                f"superlora: the dense factors make {self.dense_product_size} rows and columns of a group of "
                f"{' x '.join(map(str, self.axes))}; lower kron_block or kron_factors"
            )

    @property
    def shapes(self) -> Shapes:
        """Names and shapes of the trained tensors."""
        shapes: Shapes = {}
        if len(self.axes) == 1:
            shapes["vector"] = self.axes
        elif len(self.axes) == 2:
            rows, columns = self.low_rank_shape
            for index in range(self.num_dense):
                shapes[f"left{index}"] = (self.dense_size, self.dense_size)
            shapes["up"] = (rows, self.rank)
            shapes["down"] = (self.rank, columns)
        else:
            if self.core == "tucker":
                shapes["core"] = (self.rank,) * len(self.axes)
            for axis, side in enumerate(self.axes):
                shapes[f"factor{axis}"] = (side, self.rank)
        return shapes

    @property
    def dense_product_size(self) -> int:
        """Rows, and columns, of the Kronecker product of all dense factors."""
        return self.dense_size**self.num_dense

    @property
    def low_rank_shape(self) -> tuple[int, int]:
        """The shape of `up @ down`, the last factor of the Kronecker product; its sides are rounded up."""
        rows = -(-self.axes[0] // self.dense_product_size)
        columns = -(-self.axes[1] // self.dense_product_size)
        return rows, columns

    @property
    def columns(self) -> int:
        """Columns of the matrix whose rows are the entries: the product of the last half of the axes."""
        return math.prod(self.axes[self._row_axes :])

    @property
    def padded_columns(self) -> int:
        """The columns before the surplus of a Kronecker product is dropped."""
        if self.num_dense == 0:
            return self.columns
        return self.low_rank_shape[1] * self.dense_product_size

    @property
    def _row_axes(self) -> int:
        """The number of axes that make the rows of the matrix: the first half, rounded up."""
        return -(-len(self.axes) // 2)

    def init_tensors(self, tensors: Mapping[str, Tensor], generator: torch.Generator) -> None:
        """Fills the tensors so that all entries are zero.

        Exactly one factor stays zero: it has a gradient at once, and after one step so have the others.
        """
        zero_name = next(name for name in ("vector", "up", "core", "factor0") if name in tensors)
        for name, tensor in tensors.items():
            if name == "down":
                draw_uniform(tensor, tensor.shape[1] ** -0.5, generator)  # as in LoRA
            elif name != zero_name:
                draw_orthonormal(tensor, generator)

    def draw_tensors(self, std: float, generator: torch.Generator) -> dict[str, Tensor]:
        """Gaussian tensors (float64, on the CPU) whose entries have the standard deviation `std`.

        An entry is a sum of `terms` products of one value of each tensor, so its variance is
        `terms * std_of_each^(2 * tensors)`.
        """
        shapes = self.shapes
        # ranks that one entry sums over: one for each axis of a Tucker core, one in all of CP and of
        # `up @ down`, none of a vector
        summed_ranks = len(self.axes) if "core" in shapes else min(len(self.axes) - 1, 1)
        terms = self.rank**summed_ranks
        std_of_each = (std / terms**0.5) ** (1 / len(shapes))
        tensors = {}
        for name, shape in shapes.items():
            tensors[name] = torch.zeros(shape, dtype=torch.float64, device="cpu")
            draw_normal(tensors[name], std_of_each, generator)
        return tensors

    def vector(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """All used entries `(entries,)`."""
        if len(self.axes) == 1:
            return tensors["vector"]
        dense_factors, up, down = self.factors(tensors)
        # left_0 (x) left_1 ... (x) (up @ down), cut to its columns and read row by row
        matrix = up @ down
        for dense in reversed(dense_factors):
            matrix = torch.kron(dense, matrix)
        return matrix[:, : self.columns].reshape(-1)[: self.entries]

    def factors(self, tensors: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        """The dense Kronecker factors, and the two factors `up @ down` of the last one.

        A decomposition of more axes is a matrix product over the split of its axes into two halves:
        `up` holds the core and the factors of the first half, `down` those of the second.
        """
        dense_factors = []  # (b, b) each
        for index in range(self.num_dense):
            dense_factors.append(tensors[f"left{index}"])
        if len(self.axes) == 2:
            return dense_factors, tensors["up"], tensors["down"]
        axis_factors = []  # (d, r) each
        for axis in range(len(self.axes)):
            axis_factors.append(tensors[f"factor{axis}"])
        row_factors = axis_factors[: self._row_axes]
        column_factors = axis_factors[self._row_axes :]
        if self.core == "cp":
            # sum over the rank of outer products of columns
            return dense_factors, _khatri_rao(row_factors), _khatri_rao(column_factors).T
        # multiply the first half of the core's axes by their factors: (r, ..., r) -> (d, ..., d, r, ...)
        up = tensors["core"]
        for axis, factor in enumerate(row_factors):
            up = torch.tensordot(up, factor, ([axis], [1])).movedim(-1, axis)
        # at most five axes: one or two of them make the columns
        down = column_factors[0]  # (d, r)
        if len(column_factors) == 2:  # (d d, r r)
            down = torch.kron(column_factors[0], column_factors[1])
        return dense_factors, up.reshape(-1, down.shape[1]), down.T


def _khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """The column-wise Kronecker product of factors `(side, r)`: `(product of sides, r)`."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, None, :] * factor[None, :, :]).flatten(0, 1)
    return product
