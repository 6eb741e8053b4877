"""LoRA: a product of two thin matrices (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffadapt.algebra.expression import Update
from diffadapt.algebra.low_rank import LowRank
from diffadapt.methods.base import Shapes
from diffadapt.methods.conv_reshape import RESHAPES, factor_shapes, low_rank_change
from diffadapt.methods.random_init import draw_uniform
from diffadapt.methods.ranked import RankedMethod, check_choice
from diffadapt.methods.site import Site


@dataclass(frozen=True)
class LoRA(RankedMethod):
    """`W' = W + s * up @ down`, with `up (out, r)`, `down (r, fan_in)` and the multiplier `s`.

    Parameters: r * (out + fan_in); a convolution under `loralib`: r * k^2 * (in + out/groups).

    Source: arXiv 2106.09685, equation 3; `rank_stabilized` (alpha / sqrt(rank)): arXiv 2312.03732.
    """

    name: ClassVar[str] = "lora"
    learning_rate: ClassVar[float] = 5e-4  # diffusers' DreamBooth example

    rank_stabilized: bool = False  # multiplier = alpha / sqrt(rank)
    conv_reshape: str = "peft"  # a convolution as a matrix: peft or loralib

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("conv_reshape", self.conv_reshape, RESHAPES)

    def alpha_divisor(self) -> float:
        return math.sqrt(self.rank) if self.rank_stabilized else self.rank

    def trained_tensors(self, site: Site) -> Shapes:
        return factor_shapes(site, self.rank, self.conv_reshape)

    def init_tensors(
        self, site: Site, tensors: Mapping[str, Tensor], base: Tensor, generator: torch.Generator
    ) -> None:
        # up stays zero, so the change is zero; Kaiming's bound with a = sqrt(5), as in PEFT
        fan_in = tensors["down"].shape[1]
        draw_uniform(tensors["down"], 1 / math.sqrt(fan_in), generator)

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        # the paper's B and A: dW = s * B A
        up = tensors["up"]
        down = tensors["down"]
        if self.conv_reshape == "peft":  # the factors have the shape of the weight's own matrix
            return Update(LowRank(up, down), self.multiplier)
        return Update(low_rank_change(site, up, down), self.multiplier)
