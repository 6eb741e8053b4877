"""1LoRA: the sum of the features, times one trained vector per layer (arXiv 2503.08333)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffadapt.algebra.expression import Update
from diffadapt.algebra.low_rank import FeatureSum, LowRank
from diffadapt.methods.base import Method, Shapes
from diffadapt.methods.random_init import named_generator
from diffadapt.methods.ranked import check_choice
from diffadapt.methods.site import Site


@dataclass(frozen=True)
class OneLoRA(Method):
    """`W' = W + vector 1^T`: every output adds its entry of `vector (out,)` times the sum of its inputs.

    For a convolution, which the paper leaves open, the sum runs over the whole receptive field. `random`
    replaces the ones by a frozen normal vector (the paper's Table S1). There is no multiplier.

    Parameters: out.

    Source: arXiv 2503.08333.
    """

    name: ClassVar[str] = "1lora"
    learning_rate: ClassVar[float] = 1e-3

    compression: str = "sum"  # how inputs become one number: sum or random

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("compression", self.compression, ("sum", "random"))

    def trained_tensors(self, site: Site) -> Shapes:
        return {"vector": (site.out,)}

    def constants(self, sites: Sequence[Site], seed: int) -> dict[str, Tensor]:
        if self.compression == "sum":
            return {}
        constants = {}
        for width in {site.fan_in for site in sites}:
            generator = named_generator(seed, self.name, str(width))
            weights = torch.randn(width, dtype=torch.float64, device="cpu", generator=generator)
            constants[f"weights_{width}"] = weights
        return constants

    def shared_tensor_names(self, site: Site) -> dict[str, str]:
        return {"weights": f"weights_{site.fan_in}"} if self.compression == "random" else {}

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        if self.compression == "random":
            up = tensors["vector"][:, None]  # (out, 1)
            down = tensors["weights"][None, :]  # (1, fan_in)
            return Update(LowRank(up, down))
        return Update(FeatureSum(tensors["vector"], site.fan_in))
