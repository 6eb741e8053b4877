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
from diffadapt.methods.conv_reshape import RESHAPES, factor_shapes, low_rank_change
from diffadapt.methods.dora import row_scale
from diffadapt.methods.flora import FLoRA
from diffadapt.methods.pissa import PiSSA
from diffadapt.methods.random_init import draw_uniform
from diffadapt.methods.ranked import RankedMethod, check_choice
from diffadapt.methods.site import Site


@dataclass(frozen=True)
class LieRA(RankedMethod):
    """`W' = W o exp(s * up @ down)`, or its first order `W + W o (s * up @ down)`, as in the paper's tables.

    `o` is the entrywise product. Weights of zero cannot change, and biases do not.

    `inner` is the matrix that acts as the Lie algebra's element. The paper reports couplings without
    formulas; the readings here: `dora` renormalises, `W' = magnitude * V / ||V||` with `V` the changed
    weight and the norm without gradient; `pissa` takes `up @ down - start_up @ start_down`, since it does not
    start at zero; `flora` takes its Tucker product.

    Parameters: the inner method's (LoRA: r * (out + fan_in); with `conv_reshape="loralib"`
    r * k^2 * (in + out/groups), the papers' counts).

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
            return self._inner_method().trained_tensors(site)
        shapes = factor_shapes(site, self.rank, self.conv_reshape)
        if self.inner == "dora":
            shapes["magnitude"] = (site.out,)
        return shapes

    def has_weight_decay(self, key: str) -> bool:
        # as in PiSSA and DoRA: zero would not be "no change"
        return self.inner != "pissa" and key != "magnitude"

    def frozen_tensors(self, site: Site) -> Shapes:
        return self._inner_method().frozen_tensors(site) if self.inner == "pissa" else {}

    def init_tensors(
        self, site: Site, tensors: Mapping[str, Tensor], base: Tensor, generator: torch.Generator
    ) -> None:
        if self.inner in ("pissa", "flora"):
            self._inner_method().init_tensors(site, tensors, base, generator)
            return
        fan_in = tensors["down"].shape[1]
        draw_uniform(tensors["down"], 1 / math.sqrt(fan_in), generator)  # as in LoRA
        if self.inner == "dora":
            weight = base.flatten(1).to(tensors["magnitude"].dtype)  # (out, fan_in)
            tensors["magnitude"].copy_(weight.norm(dim=1))

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        # element X: dW = W o X to first order, dW = W o (exp(X) - 1) exactly
        element = self._element(site, tensors, base)
        if self.multiplier != 1:
            element = Scaled(element, self.multiplier)
        change = RelativeChange(base, element, exponential=self.order == "exp")
        if self.inner != "dora":
            return Update(change)
        # W' = magnitude * V / ||V|| by rows, V = W + dW, without a gradient of the norm
        with torch.no_grad():
            norm = (base.flatten(1) + change.matrix()).norm(dim=1)
        return Update(change, scale=row_scale(tensors["magnitude"], norm))

    def _element(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Expression:
        """The element of the Lie algebra, without the multiplier."""
        if self.inner == "pissa":
            return LowRankDifference(**tensors)
        if self.inner == "flora":
            return self._inner_method().update(site, tensors, base).delta
        return low_rank_change(site, tensors["up"], tensors["down"])

    def _inner_method(self) -> Method:
        return PiSSA(rank=self.rank) if self.inner == "pissa" else FLoRA(rank=self.rank)
