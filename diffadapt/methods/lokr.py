"""LoKr: a Kronecker product of a small dense matrix and a low-rank one (LyCORIS, arXiv 2309.14859)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffadapt.algebra.expression import Update
from diffadapt.algebra.full_rank import Dense, Kron
from diffadapt.algebra.low_rank import LowRank
from diffadapt.methods.base import Shapes
from diffadapt.methods.random_init import draw_uniform
from diffadapt.methods.ranked import RankedMethod
from diffadapt.methods.site import Site


@dataclass(frozen=True)
class LoKr(RankedMethod):
    """`W' = W + s * left (x) right`, the Kronecker product of a small dense matrix and a low-rank one.

    A forward multiplies it out only for grouped convolutions.

    Outputs and inputs split into two divisors each, `out = a c` and `in/groups = b d`, the smaller one first:
    `left (a, b)`, `right (c, d * kernel)`. `right` is `up @ down` where the rank is below half the longer of
    c and d, else dense with multiplier 1.

    Parameters: a b + r (c + d * kernel), or a b + c d * kernel.

    Source: arXiv 2309.14859, section 3.
    """

    name: ClassVar[str] = "lokr"
    learning_rate: ClassVar[float] = 5e-4

    factor: int = -1  # a side of the split, as in LyCORIS; -1: nearest to the square root

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor != -1 and self.factor < 1:
            raise ValueError(f"factor must be -1 or at least 1, got {self.factor}")

    def trained_tensors(self, site: Site) -> Shapes:
        a, c = self._split(site.out)
        b, d = self._split(site.channels_in)
        kernel = math.prod(site.kernel)
        if self.rank < _smallest_dense_rank(c, d):
            return {"left": (a, b), "up": (c, self.rank), "down": (self.rank, d * kernel)}
        return {"left": (a, b), "right": (c, d * kernel)}

    def ranks_where_count_drops(self, site: Site) -> tuple[int, ...]:
        _, c = self._split(site.out)
        _, d = self._split(site.channels_in)
        return (_smallest_dense_rank(c, d),)

    def init_tensors(
        self, site: Site, tensors: Mapping[str, Tensor], base: Tensor, generator: torch.Generator
    ) -> None:
        # up or right stays zero, so the product is zero
        for key in ("left", "down"):
            if key in tensors:
                draw_uniform(tensors[key], 1 / math.sqrt(tensors[key].shape[1]), generator)

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        if "right" in tensors:
            return Update(Kron(tensors["left"], Dense(tensors["right"])))
        return Update(Kron(tensors["left"], LowRank(tensors["up"], tensors["down"])), self.multiplier)

    def _split(self, size: int) -> tuple[int, int]:
        """Two divisors of a size, the smaller one first.

        One of them is `factor` where that divides the size, else the largest divisor below it.
        """
        if self.factor > 0 and size % self.factor == 0:
            partner = size // self.factor
            return min(self.factor, partner), max(self.factor, partner)
        limit = math.isqrt(size) if self.factor == -1 else min(self.factor, math.isqrt(size))
        small = next(divisor for divisor in range(limit, 0, -1) if size % divisor == 0)
        return small, size // small


def _smallest_dense_rank(rows: int, columns: int) -> int:
    """The smallest rank for which the right factor is dense: half its longer side, rounded up."""
    return -(-max(rows, columns) // 2)
