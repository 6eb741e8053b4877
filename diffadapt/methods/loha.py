"""LoHa: the entrywise product of two low-rank matrices (FedPara, Hyeon-Woo et al. 2021, arXiv 2108.06098)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffadapt.algebra.expression import Update
from diffadapt.algebra.full_rank import LowRankHadamard
from diffadapt.algebra.low_rank import LowRank
from diffadapt.methods.base import Shapes
from diffadapt.methods.random_init import draw_normal
from diffadapt.methods.ranked import RankedMethod
from diffadapt.methods.site import Site


@dataclass(frozen=True)
class LoHa(RankedMethod):
    """`W' = W + s * (up_1 @ down_1) o (up_2 @ down_2)`: rank up to r^2 for twice LoRA's parameters.

    `o` is the entrywise product.

    Parameters: 2 r (out + fan_in).

    Source: arXiv 2108.06098, equation 2; start as in LyCORIS.
    """

    name: ClassVar[str] = "loha"
    learning_rate: ClassVar[float] = 5e-4

    def trained_tensors(self, site: Site) -> Shapes:
        up_shape = (site.out, self.rank)
        down_shape = (self.rank, site.fan_in)
        return {"up_1": up_shape, "down_1": down_shape, "up_2": up_shape, "down_2": down_shape}

    def init_tensors(
        self, site: Site, tensors: Mapping[str, Tensor], base: Tensor, generator: torch.Generator
    ) -> None:
        # up_2 stays zero, so the product is zero
        for key, std in (("up_1", 0.1), ("down_1", 1.0), ("down_2", 1.0)):
            draw_normal(tensors[key], std, generator)

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        first = LowRank(tensors["up_1"], tensors["down_1"])
        second = LowRank(tensors["up_2"], tensors["down_2"])
        return Update(LowRankHadamard(first, second), self.multiplier)
