"""The table of class embeddings, trained as one wherever a model copies it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffadapt.expressions import Replace
from diffadapt.methods.base import Method, Shapes
from diffadapt.site import Kind, Site
from diffadapt.update import Update


@dataclass(frozen=True)
class ClassEmbedding(Method):
    """A new class table ``(classes, dim)`` that starts as the old one.

    diffusers' DiT holds a copy in every block: tables of one shape share one trained table, as in the
    original. Parameters: classes * dim. Source: DiffFit, arXiv 2304.06648; 1LoRA's Table 1.
    """

    name: ClassVar[str] = "class_embedding"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"embedding"})
    learning_rate: ClassVar[float] = 1e-3

    @property
    def also(self) -> tuple[str, ...]:
        return ("class_embedding",)

    def trained(self, site: Site) -> Shapes:
        return {}

    def shared(self, sites: Sequence[Site]) -> Shapes:
        return {self.lent(site)["table"]: site.shape for site in sites}

    def lent(self, site: Site) -> dict[str, str]:
        return {"table": f"table_{site.shape[0]}x{site.shape[1]}"}

    def start_shared(
        self, sites: Sequence[Site], bases: Sequence[Tensor], tensors: Mapping[str, Tensor], seed: int
    ) -> None:
        filled: dict[str, str] = {}
        for site, base in zip(sites, bases, strict=True):
            name = self.lent(site)["table"]
            if name in filled and not torch.equal(tensors[name], base.to(tensors[name].dtype)):
                raise ValueError(
                    f"{filled[name]} and {site.name} are class tables of one shape that differ; exclude "
                    f"one with '!{site.name}'"
                )
            tensors[name].copy_(base)
            filled.setdefault(name, site.name)

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        return Update(Replace(base, tensors["table"]))
