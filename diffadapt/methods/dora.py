"""DoRA: direction and magnitude of each row trained apart (Liu et al. 2024, arXiv 2402.09353)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffadapt.algebra.expression import Update
from diffadapt.methods.base import Shapes
from diffadapt.methods.lora import LoRA
from diffadapt.methods.site import Site


@dataclass(frozen=True)
class DoRA(LoRA):
    """`W' = magnitude * V / ||V||` by rows, `V = W + s * up @ down`; norms carry no gradient.

    Parameters: LoRA's and one per output.

    Source: arXiv 2402.09353, equations 5 and 11; a convolution's norm runs over all dimensions but the first,
    as in PEFT.
    """

    name: ClassVar[str] = "dora"
    learning_rate: ClassVar[float] = 5e-4

    recompute: bool = False  # make the product again in backward: less memory, one product more

    def trained_tensors(self, site: Site) -> Shapes:
        return super().trained_tensors(site) | {"magnitude": (site.out,)}

    def has_weight_decay(self, key: str) -> bool:
        return key != "magnitude"

    def init_tensors(
        self, site: Site, tensors: Mapping[str, Tensor], base: Tensor, generator: torch.Generator
    ) -> None:
        super().init_tensors(site, tensors, base, generator)
        weight = base.flatten(1).to(tensors["magnitude"].dtype)  # (out, fan_in)
        tensors["magnitude"].copy_(weight.norm(dim=1))

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        lora = super().update(site, tensors, base)
        with torch.no_grad():
            norm = _row_norms(base.flatten(1).to(tensors["up"].dtype), lora)
        scale = row_scale(tensors["magnitude"], norm)
        return Update(lora.delta, lora.multiplier, scale=scale, recompute=self.recompute)


def row_scale(magnitude: Tensor, norm: Tensor) -> Tensor:
    """`magnitude / norm` row by row; 1 for a row of zeros, whose direction is not defined."""
    is_defined = norm > 0
    return torch.where(is_defined, magnitude / torch.where(is_defined, norm, 1), 1)


def _row_norms(weight: Tensor, update: Update) -> Tensor:
    """Norms `(out,)` of the rows of `V = weight + s * up @ down`, without building `V` where it is low-rank.

    For the row `v = w + s u D` with a row `w` of the weight, a row `u` of `up` and `D = down`:

        ||v||^2 = ||w||^2 + 2 s u (D w^T) + s^2 u (D D^T) u^T
                = ||w||^2 + 2 s u (D w^T + s/2 (D D^T) u^T)
    """
    delta = update.delta
    s = update.multiplier
    factors = delta.thin_factors()
    if factors is None:
        return (weight + s * delta.matrix()).norm(dim=1)
    up = factors.up  # (out, r)
    down = factors.down  # (r, fan_in)
    cross = torch.addmm(weight @ down.T, up, down @ down.T, alpha=s / 2)  # (out, r)
    squared_norms = torch.linalg.vector_norm(weight, dim=1).square() + 2 * s * (up * cross).sum(1)
    return squared_norms.clamp(min=0).sqrt()  # rounding can make the square of a vanishing row negative
