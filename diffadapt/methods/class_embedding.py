"""The table of class embeddings, trained once where a model holds copies of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from diffadapt.algebra.class_table_expression import NewClassTable, resize_table
from diffadapt.algebra.expression import Update
from diffadapt.algebra.full_rank import Replacement
from diffadapt.methods.base import Method, Shapes
from diffadapt.methods.site import LayerKind, Site, is_class_table


@dataclass(frozen=True)
class ClassEmbedding(Method):
    """`W' = table (rows, dim)`: a new class table that starts as the old one, or one for new classes.

    diffusers' DiT holds a copy in every block: tables of one shape share one trained table, as in the
    original.

    With `classes` the table has that many rows, and the null class behind them. Class k starts as the base's
    class k, one that the base does not have as the mean of its classes, the null class as the base's. A
    larger set moves the null class to the new last row; beside a smaller one the base's other rows stay.

    Parameters: rows * dim.

    Source: DiffFit, arXiv 2304.06648; 1LoRA's Table 1.
    """

    name: ClassVar[str] = "class_embedding"
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({"embedding"})
    learning_rate: ClassVar[float] = 1e-3

    classes: int | None = field(default=None, kw_only=True)  # size of a new set; None: the base's table
    null_class: bool = field(default=True, kw_only=True)  # whether the base's last row means "no class"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes is not None and self.classes < 1:
            raise ValueError(f"{self.name}: classes must be at least 1, got {self.classes}")

    @property
    def extra_targets(self) -> tuple[str, ...]:
        return ("class_embedding",)

    def trained_tensors(self, site: Site) -> Shapes:
        return {}  # the table is shared

    def shared_tensors(self, sites: Sequence[Site]) -> Shapes:
        return {self._table_name(site): self._table_shape(site) for site in sites}

    def has_weight_decay(self, key: str) -> bool:
        return False  # zero is no embedding: decay would erase the base's table

    def shared_tensor_names(self, site: Site) -> dict[str, str]:
        return {"table": self._table_name(site)}

    def init_shared_tensors(
        self, sites: Sequence[Site], bases: Sequence[Tensor], tensors: Mapping[str, Tensor], seed: int
    ) -> None:
        first_sites: dict[str, str] = {}  # the first site of every table
        for site, base in zip(sites, bases, strict=True):
            name = self._table_name(site)
            table = tensors[name]
            start = base.to(table.dtype)
            if self.classes is not None:
                start = resize_table(start, len(table), null_class=self.null_class)
            if name in first_sites and not torch.equal(table, start):
                raise ValueError(
                    f"{first_sites[name]} and {site.name} are class tables of one shape that differ; exclude "
                    f"one with '!{site.name}'"
                )
            table.copy_(start)
            first_sites.setdefault(name, site.name)

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        if self.classes is None:
            return Update(Replacement(base, tensors["table"]))
        return Update(NewClassTable(base, tensors["table"], self.null_class))

    def _table_name(self, site: Site) -> str:
        """The name of a site's trained table: the same for tables of one shape."""
        rows, dim = self._table_shape(site)
        return f"table_{rows}x{dim}"

    def _table_shape(self, site: Site) -> tuple[int, int]:
        if self.classes is None:
            return site.shape
        if not is_class_table(site.name):
            raise ValueError(f"{self}: {site.name} is no class table, so it has no classes; exclude it")
        return self.classes + self.null_class, site.shape[1]
