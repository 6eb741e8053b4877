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
    """One group's trained tensors.

    Attributes:
        entries: how many entries of the fold are used.
        axes: ``(entries,)``: a trained vector; ``(rows, columns)``: low rank, or a Kronecker product whose
            last factor is low rank; ``(d, ..., d)``: a Tucker or CP decomposition.
        rank: of the low-rank factors.
        core: ``tucker`` trains a core for three axes or more, ``cp`` has none.
        lefts: number of dense factors of the Kronecker product before the low-rank one.
        block: their size.
    """

    entries: int
    axes: tuple[int, ...]
    rank: int = 1
    core: str = "tucker"
    lefts: int = 0
    block: int = 1

    def __post_init__(self) -> None:
        if self.blocks > MOST_PADDED * min(self.axes):
            raise ValueError(
                f"superlora: the dense factors make {self.blocks} rows and columns of a group of "
                f"{' x '.join(map(str, self.axes))}; lower kron_block or kron_factors"
            )

    @property
    def shapes(self) -> Shapes:
        """Names and shapes of the trained tensors."""
        if len(self.axes) == 1:
            return {"vector": self.axes}
        if len(self.axes) == 2:
            rows, columns = self.inner
            lefts = {f"left{index}": (self.block, self.block) for index in range(self.lefts)}
            return lefts | {"up": (rows, self.rank), "down": (self.rank, columns)}
        core = {"core": (self.rank,) * len(self.axes)} if self.core == "tucker" else {}
        return core | {f"factor{axis}": (side, self.rank) for axis, side in enumerate(self.axes)}

    @property
    def blocks(self) -> int:
        """Rows, and columns, of the Kronecker product of all dense factors."""
        return self.block**self.lefts

    @property
    def inner(self) -> tuple[int, int]:
        """The shape of the low-rank factor of a Kronecker product, its sides rounded up."""
        return -(-self.axes[0] // self.blocks), -(-self.axes[1] // self.blocks)

    @property
    def columns(self) -> int:
        """Columns of the matrix whose rows are the entries: the product of the last half of the axes."""
        return math.prod(self.axes[self._split :])

    @property
    def padded_columns(self) -> int:
        """The same before the surplus of a Kronecker product is dropped."""
        return self.inner[1] * self.blocks if self.lefts else self.columns

    @property
    def _split(self) -> int:
        return -(-len(self.axes) // 2)

    def start(self, tensors: Mapping[str, Tensor], generator: torch.Generator) -> None:
        """Fill the tensors so that all entries are zero: one factor stays zero, so none is stuck."""
        zero = next(name for name in ("vector", "up", "core", "factor0") if name in tensors)
        for name, tensor in tensors.items():
            if name == "down":
                draw_uniform(tensor, tensor.shape[1] ** -0.5, generator)  # as in LoRA
            elif name != zero:
                draw_orthonormal(tensor, generator)

    def draw(self, std: float, generator: torch.Generator) -> dict[str, Tensor]:
        """Gaussian tensors (float64, on the CPU) whose entries have the standard deviation ``std``."""
        terms = self.rank ** (len(self.axes) if "core" in self.shapes else min(len(self.axes) - 1, 1))
        each = (std / terms**0.5) ** (1 / len(self.shapes))
        drawn = {
            name: torch.zeros(shape, dtype=torch.float64, device="cpu") for name, shape in self.shapes.items()
        }
        for tensor in drawn.values():
            draw_normal(tensor, each, generator)
        return drawn

    def vector(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """All used entries ``(entries,)``."""
        if len(self.axes) == 1:
            return tensors["vector"]
        lefts, up, down = self.factors(tensors)
        matrix = up @ down
        for left in reversed(lefts):
            matrix = torch.kron(left, matrix)
        return matrix[:, : self.columns].reshape(-1)[: self.entries]

    def factors(self, tensors: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        """The dense Kronecker factors, and the two factors ``up @ down`` of the last one."""
        lefts = [tensors[f"left{index}"] for index in range(self.lefts)]
        if len(self.axes) == 2:
            return lefts, tensors["up"], tensors["down"]
        planes = [tensors[f"factor{axis}"] for axis in range(len(self.axes))]
        first, last = planes[: self._split], planes[self._split :]
        if self.core == "cp":
            return lefts, _khatri_rao(first), _khatri_rao(last).T
        up = tensors["core"]
        for axis, plane in enumerate(first):
            up = torch.tensordot(up, plane, ([axis], [1])).movedim(-1, axis)
        down = last[0] if len(last) == 1 else torch.kron(last[0], last[1])
        return lefts, up.reshape(-1, down.shape[1]), down.T


def _khatri_rao(planes: Sequence[Tensor]) -> Tensor:
    """Columns of the result ``(product of sides, r)`` are the Kronecker products of the planes' columns."""
    result = planes[0]
    for plane in planes[1:]:
        result = (result[:, None, :] * plane[None, :, :]).flatten(0, 1)
    return result
