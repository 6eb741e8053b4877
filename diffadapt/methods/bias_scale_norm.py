"""Methods that train vectors a layer has or could have: biases, output scales, norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffadapt.algebra.expression import Update
from diffadapt.algebra.full_rank import Dense
from diffadapt.methods.base import Method, Shapes
from diffadapt.methods.site import LayerKind, Site


@dataclass(frozen=True)
class BitFit(Method):
    """`b' = b + bias` for every layer that has a bias.

    Parameters: out.

    Source: arXiv 2106.10199.
    """

    name: ClassVar[str] = "bitfit"
    learning_rate: ClassVar[float] = 1e-3

    def supports(self, site: Site) -> bool:
        return super().supports(site) and site.has_bias

    def trained_tensors(self, site: Site) -> Shapes:
        return {"bias": (site.out,)}

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        return Update(bias=tensors["bias"])


@dataclass(frozen=True)
class Gamma(Method):
    """`y' = gamma * y`: every output of a layer, bias included, times a trained factor that starts at 1.

    Parameters: out.

    Source: the scale factors of DiffFit, arXiv 2304.06648, section 3.2, one per layer.
    """

    name: ClassVar[str] = "gamma"
    learning_rate: ClassVar[float] = 1e-3

    def trained_tensors(self, site: Site) -> Shapes:
        return {"gamma": (site.out,)}

    def has_weight_decay(self, key: str) -> bool:
        return False  # no change is a factor of 1, not 0

    def init_tensors(
        self, site: Site, tensors: Mapping[str, Tensor], base: Tensor, generator: torch.Generator
    ) -> None:
        tensors["gamma"].fill_(1)

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        # gamma (W x + b): W' = gamma W by rows, b' = gamma b
        return Update(scale=tensors["gamma"], bias_scale=tensors["gamma"])


@dataclass(frozen=True)
class Norms(Method):
    """`W' = W + weight`, `b' = b + bias` of every LayerNorm, GroupNorm and RMSNorm, whatever the targets.

    A norm without a bias, as most RMSNorms, trains its weight alone. Krea 2's norms multiply by `1 + W`.

    Parameters: two per channel, or one without a bias.
    """

    name: ClassVar[str] = "norms"
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({"norm"})
    learning_rate: ClassVar[float] = 1e-3

    @property
    def extra_targets(self) -> tuple[str, ...]:
        return ("norm",)

    def trained_tensors(self, site: Site) -> Shapes:
        shapes = {"weight": site.shape}
        if site.has_bias:
            shapes["bias"] = site.shape
        return shapes

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        return Update(Dense(tensors["weight"]), bias=tensors.get("bias"))
