"""Full fine-tuning of the targets, the reference of the papers on FLoRA, LieRA, 1LoRA and SuperLoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffadapt.algebra.expression import Update
from diffadapt.algebra.full_rank import Dense
from diffadapt.methods.base import Method, Shapes
from diffadapt.methods.site import LayerKind, Site


@dataclass(frozen=True)
class Full(Method):
    """`W' = W + weight`, `b' = b + bias`, both unrestricted and starting at zero.

    Parameters: as many as the layer has.
    """

    name: ClassVar[str] = "full"
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({"linear", "conv", "norm", "embedding"})
    learning_rate: ClassVar[float] = 1e-5
    trains_whole_weights: ClassVar[bool] = True

    def trained_tensors(self, site: Site) -> Shapes:
        shapes = {"weight": site.shape}
        if site.has_bias:
            shapes["bias"] = site.bias_shape
        return shapes

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        return Update(Dense(tensors["weight"]), bias=tensors.get("bias"))
