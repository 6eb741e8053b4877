"""The table of class embeddings, trained as one wherever a model copies it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from diffadapt.algebra.class_table_rows import NewRows, resized
from diffadapt.algebra.expression import Update
from diffadapt.algebra.full_rank import Replacement
from diffadapt.methods.base import Method, Shapes
from diffadapt.methods.site import LayerKind, Site, is_class_table


@dataclass(frozen=True)
class ClassEmbedding(Method):
    """A new class table ``(rows, dim)`` that starts as the old one, or one for a new set of classes.

    diffusers' DiT holds a copy in every block: tables of one shape share one trained table, as in the
    original. Parameters: rows * dim. Source: DiffFit, arXiv 2304.06648; 1LoRA's Table 1.

    With ``classes`` the table has that many rows, and the null class behind them. Class k starts as the
    base's class k, one that the base does not have as the mean of its classes, the null class as the base's.
    A larger set moves the null class to the new last row; beside a smaller one the base's other rows stay.
    """

    name: ClassVar[str] = "class_embedding"
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({"embedding"})
    learning_rate: ClassVar[float] = 1e-3

    classes: int | None = field(default=None, kw_only=True)  # of a new set; None: the base's rows
    null_class: bool = field(default=True, kw_only=True)  # whether the base's last row means "no class"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes is not None and self.classes < 1:
            raise ValueError(f"{self.name}: classes must be at least 1, got {self.classes}")

    @property
    def extra_targets(self) -> tuple[str, ...]:
        return ("class_embedding",)

    def trained_tensors(self, site: Site) -> Shapes:
        return {}

    def shared_tensors(self, sites: Sequence[Site]) -> Shapes:
        return {self.shared_tensor_names(site)["table"]: self._table(site) for site in sites}

    def has_weight_decay(self, key: str) -> bool:
        return False

    def shared_tensor_names(self, site: Site) -> dict[str, str]:
        rows, dim = self._table(site)
        return {"table": f"table_{rows}x{dim}"}

    def init_shared_tensors(
        self, sites: Sequence[Site], bases: Sequence[Tensor], tensors: Mapping[str, Tensor], seed: int
    ) -> None:
        filled: dict[str, str] = {}
        for site, base in zip(sites, bases, strict=True):
            name = self.shared_tensor_names(site)["table"]
            start = base.to(tensors[name].dtype)
            if self.classes is not None:
                start = resized(start, len(tensors[name]), null_class=self.null_class)
            if name in filled and not torch.equal(tensors[name], start):
                raise ValueError(
                    f"{filled[name]} and {site.name} are class tables of one shape that differ; exclude "
                    f"one with '!{site.name}'"
                )
            tensors[name].copy_(start)
            filled.setdefault(name, site.name)

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        if self.classes is None:
            return Update(Replacement(base, tensors["table"]))
        return Update(NewRows(base, tensors["table"], self.null_class))

    def _table(self, site: Site) -> tuple[int, int]:
        """The shape of the trained table."""
        if self.classes is None:
            return site.shape
        if not is_class_table(site.name):
            raise ValueError(f"{self}: {site.name} is no class table, so it has no classes; exclude it")
        return self.classes + self.null_class, site.shape[1]
