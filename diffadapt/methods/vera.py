"""VeRA: frozen random factors shared by layers, two trained vectors for each (arXiv 2310.11454)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffadapt.algebra.expression import Update
from diffadapt.algebra.low_rank import ScaledFactors
from diffadapt.methods.base import Method, Shapes
from diffadapt.methods.random_init import draw_uniform, named_generator
from diffadapt.methods.ranked import check_rank
from diffadapt.methods.site import Site

MOST_ROWS = 8_192


@dataclass(frozen=True)
class VeRA(Method):
    """`W' = W + diag(out_scale) up diag(rank_scale) down`; `up` and `down` frozen, one pair per shape.

    The frozen matrices are drawn from the seed again when a file is loaded.

    Parameters: out + r.

    Source: arXiv 2310.11454, equation 2; uniform Kaiming start with gain sqrt(2) as in PEFT.
    """

    name: ClassVar[str] = "vera"
    learning_rate: ClassVar[float] = 1e-2

    rank: int = 256  # rows of the frozen matrices
    d_init: float = 0.1  # start of rank_scale

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank("rank", self.rank)
        if self.rank > MOST_ROWS:
            raise ValueError(
                f"vera: rank must be at most {MOST_ROWS}, as frozen matrices of it are drawn, got {self.rank}"
            )

    def trained_tensors(self, site: Site) -> Shapes:
        return {"out_scale": (site.out,), "rank_scale": (self.rank,)}

    def constants(self, sites: Sequence[Site], seed: int) -> dict[str, Tensor]:
        constants: dict[str, Tensor] = {}
        for site in sites:
            shapes = {"up": (site.out, self.rank), "down": (self.rank, site.fan_in)}
            for key, name in self.shared_tensor_names(site).items():
                if name in constants:  # sites of one shape share a pair
                    continue
                matrix = torch.empty(shapes[key], dtype=torch.float64, device="cpu")
                bound = math.sqrt(6 / matrix.shape[1])  # gain sqrt(2) times sqrt(3 / fan_in)
                draw_uniform(matrix, bound, named_generator(seed, self.name, name))
                constants[name] = matrix
        return constants

    def shared_tensor_names(self, site: Site) -> dict[str, str]:
        return {key: f"{key}_{site.out}x{site.fan_in}" for key in ("up", "down")}

    def init_tensors(
        self, site: Site, tensors: Mapping[str, Tensor], base: Tensor, generator: torch.Generator
    ) -> None:
        tensors["rank_scale"].fill_(self.d_init)

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        # the paper's Lambda_b B Lambda_d A: out_scale, up, rank_scale, down
        return Update(ScaledFactors(**tensors))
