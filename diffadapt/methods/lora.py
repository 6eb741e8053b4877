"""LoRA: a product of two thin matrices (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffadapt.methods.base import Shapes
from diffadapt.methods.draws import draw_uniform
from diffadapt.methods.ranked import RankedMethod
from diffadapt.site import Site
from diffadapt.update import LowRank, Update


@dataclass(frozen=True)
class LoRA(RankedMethod):
    """``W' = W + multiplier * up @ down``, with ``up (out, r)`` and ``down (r, fan_in)``.

    Parameters: r * (out + fan_in). A convolution's weight is the matrix ``(out, in/groups * kernel)``, as in
    PEFT.
    Source: arXiv 2106.09685, equation 3; ``rank_stabilized`` (alpha / sqrt(rank)): arXiv 2312.03732.
    """

    name: ClassVar[str] = "lora"
    learning_rate: ClassVar[float] = 5e-4  # diffusers' DreamBooth example

    rank_stabilized: bool = False  # multiplier = alpha / sqrt(rank)

    def alpha_divisor(self) -> float:
        return math.sqrt(self.rank) if self.rank_stabilized else self.rank

    def trained(self, site: Site) -> Shapes:
        return {"up": (site.out, self.rank), "down": (self.rank, site.fan_in)}

    def start(
        self, site: Site, tensors: Mapping[str, Tensor], base: Tensor, generator: torch.Generator
    ) -> None:
        draw_uniform(
            tensors["down"], 1 / math.sqrt(site.fan_in), generator
        )  # Kaiming with a = sqrt(5), as in PEFT

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        return Update(LowRank(tensors["up"], tensors["down"]), self.multiplier)
