"""One group of SuperLoRA: the sites' changes from its trained tensors, with or without a projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffadapt.algebra.expression import Expression
from diffadapt.algebra.full_rank import Dense, Kron
from diffadapt.algebra.low_rank import LowRank
from diffadapt.methods.base import Shapes
from diffadapt.methods.grouped.fastfood import draw_projection, padded_size, project
from diffadapt.methods.grouped.folds import Fold
from diffadapt.methods.grouped.grouping import Group, Piece
from diffadapt.methods.grouped.slices import KronRows, Slice, join, part_shapes
from diffadapt.methods.random_init import named_generator
from diffadapt.methods.site import Site


@dataclass(frozen=True)
class GroupPlan:
    """What one group needs in every forward, worked out once from shapes.

    Attributes:
        name: of the group; the first word of its tensors' names.
        group: the pieces of sites it holds.
        fold: how its trained tensors make its entries.
        projection: what the entries go through, as in ``fastfood``.
        shapes: the matrix shape of every piece.
        kron: whether its one site is the Kronecker product itself, so that the factored forward serves.
    """

    name: str
    group: Group
    fold: Fold
    projection: str
    shapes: tuple[tuple[int, int], ...]
    kron: bool

    @property
    def trained(self) -> Shapes:
        return {f"{self.name}_{key}": shape for key, shape in self.fold.shapes.items()}

    def start(self, tensors: Mapping[str, Tensor], seed: int) -> None:
        """Fill the trained tensors. A nonlinear projection has no slope at zero, so it starts elsewhere."""
        own = self._own(tensors)
        if not self.projection.startswith("nonlinear"):
            self.fold.start(own, named_generator(seed, self.name))
            return
        for key, value in self._nonlinear_start(seed).items():
            own[key].copy_(value)

    def constants(self, seed: int) -> dict[str, Tensor]:
        """Frozen numbers by name; groups of equal sizes name, and share, the same projection."""
        named: dict[str, Tensor] = {}
        if self.projection != "none":
            drawn = draw_projection(self.fold.entries, self.group.size, self.projection, seed)
            named |= {f"{self._sizes}_{key}": value for key, value in drawn.items()}
        elif self._takes_rows:
            rows = torch.cat(
                [torch.arange(r.start, r.stop, device="cpu") for r in map(self._rows, self.group.pieces)]
            )
            named[f"{self.name}_rows"] = rows.to(torch.int32)
        if self.projection.startswith("nonlinear"):
            named |= {f"{self.name}_{key}_start": value for key, value in self._nonlinear_start(seed).items()}
        return named

    def changes(self, tensors: Mapping[str, Tensor]) -> list[Expression]:
        """The change of every piece, as a matrix of its shape."""
        own = self._own(tensors)
        if self.projection == "none" and len(self.fold.axes) > 1:
            return self._slices(own, tensors.get(f"{self.name}_rows"))
        entries = self.fold.vector(own) if self.projection == "none" else self._projected(own, tensors)
        lengths = [piece.length for piece in self.group.pieces]
        parts = entries.split([*lengths, self.group.size - sum(lengths)])
        own_parts = zip(parts[: len(lengths)], self.shapes, strict=True)  # the last part is nobody's
        return [Dense(part.reshape(shape)) for part, shape in own_parts]

    def _projected(self, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        """All entries of the group through its projection, less what that makes of their start."""
        known = {key: f"{self._sizes}_{key}" for key in ("permutation", "gauss", "last")}
        drawn = {key: tensors[name] for key, name in known.items() if name in tensors}

        def projected(factors: Mapping[str, Tensor]) -> Tensor:
            return project(self.fold.vector(factors), drawn, self.projection)

        if not self.projection.startswith("nonlinear"):
            return projected(own)
        start = {key: tensors[f"{self.name}_{key}_start"] for key in self.fold.shapes}
        # tanh would keep another vector as long as the group for backward: it is made again there
        return checkpoint(projected, own, use_reentrant=False, preserve_rng_state=False) - projected(start)

    def _slices(self, own: Mapping[str, Tensor], rows: Tensor | None) -> list[Expression]:
        """Every piece from the rows of the factors it touches: nothing as large as a weight is kept."""
        lefts, up, down = self.fold.factors(own)
        if rows is None:
            whole: Expression = LowRank(up, down)
            for left in reversed(lefts):
                whole = Kron(left, whole)
            return [whole] if self.kron else [self._slice(whole, up.shape[0], 0)]
        counts = [len(self._rows(piece)) for piece in self.group.pieces]
        parts: list[Expression] = [
            LowRank(u, down) for u in up.index_select(0, rows % up.shape[0]).split(counts)
        ]
        block = up.shape[0]
        for left in reversed(lefts):
            chosen = left.index_select(0, rows // block % self.fold.block).split(counts)
            parts = [KronRows(own, part) for own, part in zip(chosen, parts, strict=True)]
            block *= self.fold.block
        return [self._slice(parts[i], count, i) for i, count in enumerate(counts)]

    def _slice(self, rows: Expression, height: int, index: int) -> Expression:
        fold, shape = self.fold, self.shapes[index]
        start = self.group.pieces[index].offset % fold.columns
        if start == 0 and shape == (height, fold.columns) == (height, fold.padded_columns):
            return rows
        return Slice(rows, height, fold.padded_columns, fold.columns, start, shape)

    def _rows(self, piece: Piece) -> range:
        """The rows of the fold's matrix that hold a piece."""
        columns = self.fold.columns
        return range(piece.offset // columns, (piece.offset + piece.length - 1) // columns + 1)

    @property
    def _takes_rows(self) -> bool:
        return (
            len(self.fold.axes) > 1 and not self.kron and (len(self.group.pieces) > 1 or self.fold.lefts > 0)
        )

    @property
    def _sizes(self) -> str:
        return f"fastfood_{self.fold.entries}_{self.group.size}"

    def _own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensors[f"{self.name}_{key}"] for key in self.fold.shapes}

    def _nonlinear_start(self, seed: int) -> dict[str, Tensor]:
        """Where tanhshrink has a slope: its argument starts with standard deviation 1."""
        shrinks_by = (self.fold.entries / padded_size(self.fold.entries, self.group.size)) ** 0.5
        return self.fold.draw(1 / shrinks_by, named_generator(seed, self.name))


@dataclass(frozen=True)
class Layout:
    """All groups of an adapter, and the sites' matrix shapes."""

    groups: tuple[GroupPlan, ...]
    shapes: tuple[tuple[int, int], ...]

    def changes(self, tensors: Mapping[str, Tensor]) -> list[Expression]:
        """The change of every site."""
        parts: list[list[Expression]] = [[] for _ in self.shapes]
        lengths: list[list[int]] = [[] for _ in self.shapes]
        for plan in self.groups:
            for piece, change in zip(plan.group.pieces, plan.changes(tensors), strict=True):
                parts[piece.site].append(change)
                lengths[piece.site].append(piece.length)
        return [join(*own) for own in zip(parts, lengths, self.shapes, strict=True)]


def plan_groups(
    sites: Sequence[Site], groups: Sequence[Group], folds: Sequence[Fold], projection: str
) -> Layout:
    """Put the shapes of all pieces beside the groups and their folds."""
    lengths: list[list[int]] = [[] for _ in sites]
    for group in groups:
        for piece in group.pieces:
            lengths[piece.site].append(piece.length)
    waiting = [part_shapes(own, site.fan_in) for own, site in zip(lengths, sites, strict=True)]
    plans = []
    for number, (group, fold) in enumerate(zip(groups, folds, strict=True)):
        shapes = tuple(waiting[piece.site].pop(0) for piece in group.pieces)
        first = sites[group.pieces[0].site]
        kron = (
            projection == "none"
            and fold.lefts > 0
            and shapes == (fold.axes,) == ((first.out, first.fan_in),)
            and first.out % fold.blocks == first.channels_in % fold.blocks == 0
        )
        plans.append(GroupPlan(f"group{number}", group, fold, projection, shapes, kron))
    return Layout(tuple(plans), tuple((site.out, site.fan_in) for site in sites))
