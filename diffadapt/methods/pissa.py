"""PiSSA: LoRA that starts from the weight's leading singular vectors (Meng et al. 2024, arXiv 2404.02948)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffadapt.algebra.expression import Update
from diffadapt.algebra.low_rank import LowRankDifference
from diffadapt.methods.base import Method, Shapes
from diffadapt.methods.ranked import check_rank
from diffadapt.methods.site import Site


@dataclass(frozen=True)
class PiSSA(Method):
    """`W' = W + up @ down - start_up @ start_down`; the start is the top-r SVD of the loaded weight.

    The paper subtracts the start from the weight; here it is part of the change, stored in the file and not
    trained, so that the base stays untouched.

    Parameters: r * (out + fan_in).

    Source: arXiv 2404.02948, equations 2 to 4.
    """

    name: ClassVar[str] = "pissa"
    learning_rate: ClassVar[float] = 1e-4

    rank: int = 4  # singular vectors trained

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank("rank", self.rank)

    def trained_tensors(self, site: Site) -> Shapes:
        return {"up": (site.out, self.rank), "down": (self.rank, site.fan_in)}

    def frozen_tensors(self, site: Site) -> Shapes:
        return {f"start_{key}": shape for key, shape in self.trained_tensors(site).items()}

    def has_weight_decay(self, key: str) -> bool:
        return False  # zeros would take the start out of the weight

    def init_tensors(
        self, site: Site, tensors: Mapping[str, Tensor], base: Tensor, generator: torch.Generator
    ) -> None:
        # W = U S V^T: up = U S^1/2 and down = S^1/2 V^T, of the r largest singular values
        u, singular_values, vh = torch.linalg.svd(base.flatten(1).double(), full_matrices=False)
        rank = min(self.rank, len(singular_values))  # a rank above the weight's own leaves zeros
        root = singular_values[:rank].sqrt()
        up = u[:, :rank] * root  # (out, rank)
        down = root[:, None] * vh[:rank]  # (rank, fan_in)
        for key in ("up", "start_up"):
            tensors[key][:, :rank] = up.to(tensors[key].dtype)
        for key in ("down", "start_down"):
            tensors[key][:rank] = down.to(tensors[key].dtype)

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        return Update(LowRankDifference(**tensors))
