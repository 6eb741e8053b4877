"""DiffFit: biases, output scales, norms and the class table (Xie et al. 2023, arXiv 2304.06648)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffadapt.algebra.expression import Update
from diffadapt.methods.base import Shapes
from diffadapt.methods.bias_scale_norm import Norms
from diffadapt.methods.class_embedding import ClassEmbedding
from diffadapt.methods.site import LayerKind, Site


@dataclass(frozen=True)
class DiffFit(ClassEmbedding):
    """`y' = gamma * (y + beta)` for every Linear and convolution, affine norms, and the class table.

    The options `classes` and `null_class` are those of `class_embedding`.

    Parameters: as 1LoRA's Table 1 counts DiffFit on DiT: two per output, norms, table. Its tables for
    Depth-Anything and LLaMA count one vector per layer: that is `gamma=False`. The authors' own code places
    gamma on residual branches and in single layers only, with other totals.

    Source: arXiv 2304.06648, section 3.2.
    """

    name: ClassVar[str] = "difffit"
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({"linear", "conv", "norm", "embedding"})
    learning_rate: ClassVar[float] = 1e-3

    gamma: bool = True  # a factor per output, starting at 1
    beta: bool = True  # a bias per output, starting at 0
    norms: bool = True  # weights and biases of all norms
    class_embedding: bool = True  # the class table, where the model has one

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.gamma or self.beta or self.norms or self.class_embedding):
            raise ValueError("difffit: gamma, beta, norms and class_embedding are all off; switch one on")
        if self.classes is not None and not self.class_embedding:
            raise ValueError(f"difffit: classes={self.classes} needs class_embedding, which is off")

    @property
    def extra_targets(self) -> tuple[str, ...]:
        presets = []
        if self.norms:
            presets.append("norm")
        if self.class_embedding:
            presets.append("class_embedding")
        return tuple(presets)

    def supports(self, site: Site) -> bool:
        if site.kind == "norm":
            return self.norms
        if site.kind == "embedding":
            return self.class_embedding
        return self.gamma or self.beta

    def trained_tensors(self, site: Site) -> Shapes:
        if site.kind == "norm":
            return Norms().trained_tensors(site)
        shapes: Shapes = {}
        if site.kind == "embedding":
            return shapes  # the class table is shared
        if self.gamma:
            shapes["gamma"] = (site.out,)
        if self.beta:
            shapes["beta"] = (site.out,)
        return shapes

    def has_weight_decay(self, key: str) -> bool:
        return key != "gamma" and not key.startswith("table_")

    def shared_tensors(self, sites: Sequence[Site]) -> Shapes:
        return super().shared_tensors([site for site in sites if site.kind == "embedding"])

    def shared_tensor_names(self, site: Site) -> dict[str, str]:
        return super().shared_tensor_names(site) if site.kind == "embedding" else {}

    def init_shared_tensors(
        self, sites: Sequence[Site], bases: Sequence[Tensor], tensors: Mapping[str, Tensor], seed: int
    ) -> None:
        table_sites = []
        tables = []
        for site, base in zip(sites, bases, strict=True):
            if site.kind == "embedding":
                table_sites.append(site)
                tables.append(base)
        super().init_shared_tensors(table_sites, tables, tensors, seed)

    def init_tensors(
        self, site: Site, tensors: Mapping[str, Tensor], base: Tensor, generator: torch.Generator
    ) -> None:
        if "gamma" in tensors:
            tensors["gamma"].fill_(1)

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        if site.kind == "norm":
            return Norms().update(site, tensors, base)
        if site.kind == "embedding":
            return super().update(site, tensors, base)
        # gamma (W x + b + beta): W' = gamma W by rows, b' = gamma (b + beta)
        gamma = tensors.get("gamma")
        return Update(scale=gamma, bias=tensors.get("beta"), bias_scale=gamma)
