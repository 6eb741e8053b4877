"""LieRA: a multiplicative change of every entry, on the Lie group of non-zero weights (arXiv 2504.00851)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffadapt.algebra.expression import Expression, Update
from diffadapt.algebra.full_rank import RelativeChange, Scaled
from diffadapt.algebra.low_rank import LowRankDifference
from diffadapt.methods.base import Method, Shapes
from diffadapt.methods.conv_reshape import RESHAPES, factor_shapes, low_rank
from diffadapt.methods.dora import rescale
from diffadapt.methods.flora import FLoRA
from diffadapt.methods.pissa import PiSSA
from diffadapt.methods.random_init import draw_uniform
from diffadapt.methods.ranked import RankedMethod, check_choice
from diffadapt.methods.site import Site


@dataclass(frozen=True)
class LieRA(RankedMethod):
    """``W' = W * exp(s * up @ down)``, or to first order ``W + W * (s * up @ down)``, as its tables use.

    Weights of zero cannot move, biases do not. Parameters: the inner method's (LoRA: r * (out + fan_in); with
    ``conv_reshape="loralib"`` r * k^2 * (in + out/groups), the papers' counts).

    ``inner`` is the matrix that acts as the Lie algebra's element. The paper reports couplings without
    formulas; the readings here: ``dora`` renormalises, ``W' = magnitude * V / ||V||`` with ``V`` the changed
    weight and the norm without gradient; ``pissa`` takes ``up @ down - start_up @ start_down``, since it does
    not start at zero; ``flora`` takes its Tucker product.
    Source: arXiv 2504.00851, equations 5 to 8; rates are about ten times LoRA's, as changes are relative.
    """

    name: ClassVar[str] = "liera"
    learning_rate: ClassVar[float] = 3e-3

    order: str = "first"  # first or exp
    conv_reshape: str = "peft"  # a convolution as a matrix: peft or loralib
    inner: str = "lora"  # lora, dora, pissa or flora

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("order", self.order, ("first", "exp"))
        check_choice("conv_reshape", self.conv_reshape, RESHAPES)
        check_choice("inner", self.inner, ("lora", "dora", "pissa", "flora"))
        if self.conv_reshape != "peft" and self.inner in ("pissa", "flora"):
            raise ValueError(
                f"liera: inner={self.inner} has factors of its own shapes, so conv_reshape="
                f"{self.conv_reshape} would have no effect; leave it out, or take inner=lora or dora"
            )

    def trained_tensors(self, site: Site) -> Shapes:
        if self.inner in ("pissa", "flora"):
            return self._inner().trained_tensors(site)
        magnitude = {"magnitude": (site.out,)} if self.inner == "dora" else {}
        return factor_shapes(site, self.rank, self.conv_reshape) | magnitude

    def has_weight_decay(self, key: str) -> bool:
        return self.inner != "pissa" and key != "magnitude"

    def frozen_tensors(self, site: Site) -> Shapes:
        return self._inner().frozen_tensors(site) if self.inner == "pissa" else {}

    def init_tensors(
        self, site: Site, tensors: Mapping[str, Tensor], base: Tensor, generator: torch.Generator
    ) -> None:
        if self.inner in ("pissa", "flora"):
            self._inner().init_tensors(site, tensors, base, generator)
            return
        draw_uniform(tensors["down"], 1 / math.sqrt(tensors["down"].shape[1]), generator)
        if self.inner == "dora":
            tensors["magnitude"].copy_(base.flatten(1).to(tensors["magnitude"].dtype).norm(dim=1))

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        element = self._element(site, tensors, base)
        element = element if self.multiplier == 1 else Scaled(element, self.multiplier)
        change = RelativeChange(base, element, exponential=self.order == "exp")
        if self.inner != "dora":
            return Update(change)
        with torch.no_grad():
            norm = (base.flatten(1) + change.matrix()).norm(dim=1)
        return Update(change, scale=rescale(tensors["magnitude"], norm))

    def _element(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Expression:
        if self.inner == "pissa":
            return LowRankDifference(**tensors)
        if self.inner == "flora":
            return self._inner().update(site, tensors, base).delta
        return low_rank(site, tensors["up"], tensors["down"])

    def _inner(self) -> Method:
        return PiSSA(rank=self.rank) if self.inner == "pissa" else FLoRA(rank=self.rank)
