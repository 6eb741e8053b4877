"""The changes of SuperLoRA's sites from the trained tensors of its groups, with or without a projection."""

from __future__ import annotations

from collections import defaultdict
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
from diffadapt.methods.grouped.slices import KronRows, Slice, join_runs, run_shapes
from diffadapt.methods.random_init import named_generator
from diffadapt.methods.site import Site


@dataclass(frozen=True)
class GroupPlan:
    """What one group needs in every forward, worked out once from shapes.

    Attributes:
        name: the group's name; the first word of its tensors' names.
        group: the pieces of sites that it holds.
        fold: how its trained tensors make its entries.
        projection: the projection of the entries, one of `fastfood.PROJECTIONS`.
        shapes: the matrix shape of every piece.
        is_kron: whether its only site is the Kronecker product itself, so that the factored forward serves.
    """

    name: str
    group: Group
    fold: Fold
    projection: str
    shapes: tuple[tuple[int, int], ...]
    is_kron: bool

    @property
    def trained_tensors(self) -> Shapes:
        """Names and shapes of the group's trained tensors."""
        return {f"{self.name}_{key}": shape for key, shape in self.fold.shapes.items()}

    def init_tensors(self, tensors: Mapping[str, Tensor], seed: int) -> None:
        """Fills the trained tensors, so that the group changes nothing.

        A nonlinear projection has no slope at zero, so its tensors start at the values of `_nonlinear_start`,
        whose output `changes` subtracts.
        """
        fold_tensors = self._fold_tensors(tensors)
        if not self._is_nonlinear:
            self.fold.init_tensors(fold_tensors, named_generator(seed, self.name))
            return
        for key, value in self._nonlinear_start(seed).items():
            fold_tensors[key].copy_(value)

    def constants(self, seed: int) -> dict[str, Tensor]:
        """Frozen numbers by name; groups of equal sizes name, and share, the same projection."""
        constants: dict[str, Tensor] = {}
        if self.projection != "none":
            projection = draw_projection(self.fold.entries, self.group.size, self.projection, seed)
            for key, value in projection.items():
                constants[f"{self._projection_name}_{key}"] = value
        elif self._gathers_rows:
            rows = []
            for piece in self.group.pieces:
                piece_rows = self._rows_of(piece)
                rows.append(torch.arange(piece_rows.start, piece_rows.stop, device="cpu"))
            constants[f"{self.name}_rows"] = torch.cat(rows).to(torch.int32)
        if self._is_nonlinear:
            for key, value in self._nonlinear_start(seed).items():
                constants[f"{self.name}_{key}_start"] = value
        return constants

    def changes(self, tensors: Mapping[str, Tensor]) -> list[Expression]:
        """The change of every piece, as a matrix of its shape.

        Args:
            tensors: the shared tensors and the constants of the method, by name.
        """
        fold_tensors = self._fold_tensors(tensors)
        if self.projection == "none" and len(self.fold.axes) > 1:
            return self._sliced_changes(fold_tensors, tensors.get(f"{self.name}_rows"))
        if self.projection == "none":
            entries = self.fold.vector(fold_tensors)  # (group.size,)
        else:
            entries = self._projected_entries(fold_tensors, tensors)
        lengths = [piece.length for piece in self.group.pieces]
        surplus = self.group.size - sum(lengths)  # entries of the last group that belong to no site
        runs = entries.split([*lengths, surplus])[: len(lengths)]
        changes: list[Expression] = []
        for run, shape in zip(runs, self.shapes, strict=True):
            changes.append(Dense(run.reshape(shape)))
        return changes

    def _projected_entries(self, fold_tensors: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        """All entries of the group: the fold through its projection, less the output of its start.

        entries = F(fold(tensors))                          linear projections
        entries = F(fold(tensors)) - F(fold(start))         nonlinear projections
        """
        projection_tensors = {}
        for key in ("permutation", "gauss", "last"):
            name = f"{self._projection_name}_{key}"
            if name in tensors:
                projection_tensors[key] = tensors[name]

        def project_fold(factors: Mapping[str, Tensor]) -> Tensor:
            return project(self.fold.vector(factors), projection_tensors, self.projection)

        if not self._is_nonlinear:
            return project_fold(fold_tensors)
        start = {}
        for key in self.fold.shapes:
            start[key] = tensors[f"{self.name}_{key}_start"]
        # tanh would keep another vector as long as the group for backward: it is computed again there
        entries = checkpoint(project_fold, fold_tensors, use_reentrant=False, preserve_rng_state=False)
        return entries - project_fold(start)

    def _sliced_changes(self, fold_tensors: Mapping[str, Tensor], rows: Tensor | None) -> list[Expression]:
        """The change of every piece from the rows of the factors that it touches.

        Nothing as large as a weight is kept. Row `i` of `first (x) second`, for a `second` of n rows, is
        `first[i // n] (x) second[i % n]`.

        Args:
            fold_tensors: the trained tensors by the fold's names.
            rows: the rows of the fold's matrix that the pieces touch, one piece after the other; None where
                the only piece takes the matrix as it is.
        """
        dense_factors, up, down = self.fold.factors(fold_tensors)
        if rows is None:
            matrix: Expression = LowRank(up, down)
            for dense in reversed(dense_factors):
                matrix = Kron(dense, matrix)
            return [matrix] if self.is_kron else [self._slice(matrix, up.shape[0], 0)]
        counts = [len(self._rows_of(piece)) for piece in self.group.pieces]
        up_rows = up.index_select(0, rows % up.shape[0]).split(counts)
        blocks: list[Expression] = []  # of every piece the rows that it touches, one factor more each time
        for piece_rows in up_rows:
            blocks.append(LowRank(piece_rows, down))
        product_rows = up.shape[0]  # n, the rows of the product of the factors after this one
        for dense in reversed(dense_factors):
            # i // n is a row of this factor and of all before it; modulo its size, of this one alone
            dense_rows = dense.index_select(0, rows // product_rows % self.fold.dense_size).split(counts)
            for index, piece_rows in enumerate(dense_rows):
                blocks[index] = KronRows(piece_rows, blocks[index])
            product_rows *= self.fold.dense_size
        changes = []
        for index, count in enumerate(counts):
            changes.append(self._slice(blocks[index], count, index))
        return changes

    def _slice(self, rows: Expression, height: int, index: int) -> Expression:
        """Piece number `index` of the group, cut out of the `height` rows that it touches."""
        fold = self.fold
        shape = self.shapes[index]
        start = self.group.pieces[index].offset % fold.columns
        is_all_of_rows = start == 0 and shape == (height, fold.columns) == (height, fold.padded_columns)
        if is_all_of_rows:
            return rows
        return Slice(rows, height, fold.padded_columns, fold.columns, start, shape)

    def _rows_of(self, piece: Piece) -> range:
        """The rows of the fold's matrix that hold a piece."""
        columns = self.fold.columns
        first_row = piece.offset // columns
        last_row = (piece.offset + piece.length - 1) // columns
        return range(first_row, last_row + 1)

    @property
    def _gathers_rows(self) -> bool:
        """Whether pieces are made from some rows of the factors: not where one piece is the matrix itself."""
        if len(self.fold.axes) == 1 or self.is_kron:
            return False
        return len(self.group.pieces) > 1 or self.fold.num_dense > 0

    @property
    def _is_nonlinear(self) -> bool:
        return self.projection.startswith("nonlinear")

    @property
    def _projection_name(self) -> str:
        """The first words of the names of the projection's tensors, which groups of equal sizes share."""
        return f"fastfood_{self.fold.entries}_{self.group.size}"

    def _fold_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The group's trained tensors by the fold's names."""
        fold_tensors = {}
        for key in self.fold.shapes:
            fold_tensors[key] = tensors[f"{self.name}_{key}"]
        return fold_tensors

    def _nonlinear_start(self, seed: int) -> dict[str, Tensor]:
        """Start where tanhshrink has a slope: its argument has standard deviation 1.

        A projection to `n` entries changes the standard deviation by sqrt(entries / n).
        """
        shrink_factor = (self.fold.entries / padded_size(self.fold.entries, self.group.size)) ** 0.5
        return self.fold.draw_tensors(1 / shrink_factor, named_generator(seed, self.name))


@dataclass(frozen=True)
class AdapterPlan:
    """All groups of an adapter, and the sites' matrix shapes."""

    groups: tuple[GroupPlan, ...]
    shapes: tuple[tuple[int, int], ...]

    def changes(self, tensors: Mapping[str, Tensor]) -> list[Expression]:
        """The change of every site.

        Args:
            tensors: the shared tensors and the constants of the method, by name.
        """
        site_changes: defaultdict[int, list[Expression]] = defaultdict(list)
        site_lengths: defaultdict[int, list[int]] = defaultdict(list)
        for group_plan in self.groups:
            group_changes = group_plan.changes(tensors)
            for piece, change in zip(group_plan.group.pieces, group_changes, strict=True):
                site_changes[piece.site].append(change)
                site_lengths[piece.site].append(piece.length)
        joined = []
        for site, shape in enumerate(self.shapes):
            joined.append(join_runs(site_changes[site], site_lengths[site], shape))
        return joined


def plan_groups(
    sites: Sequence[Site], groups: Sequence[Group], folds: Sequence[Fold], projection: str
) -> AdapterPlan:
    """Works out the shapes of all pieces of the groups.

    Args:
        sites: all sites of the method.
        groups: the groups that the sites are cut into.
        folds: one fold per group.
        projection: the projection of every group.
    """
    site_lengths: defaultdict[int, list[int]] = defaultdict(list)
    for group in groups:
        for piece in group.pieces:
            site_lengths[piece.site].append(piece.length)
    # for every site the shapes of its pieces, in the order in which the groups hold them
    pending_shapes = []
    for index, site in enumerate(sites):
        pending_shapes.append(run_shapes(site_lengths[index], site.fan_in))
    plans = []
    for number, (group, fold) in enumerate(zip(groups, folds, strict=True)):
        shapes = []
        for piece in group.pieces:
            shapes.append(pending_shapes[piece.site].pop(0))
        is_kron = projection == "none" and _is_kron(fold, tuple(shapes), sites[group.pieces[0].site])
        plans.append(GroupPlan(f"group{number}", group, fold, projection, tuple(shapes), is_kron))
    matrix_shapes = tuple((site.out, site.fan_in) for site in sites)
    return AdapterPlan(tuple(plans), matrix_shapes)


def _is_kron(fold: Fold, shapes: tuple[tuple[int, int], ...], site: Site) -> bool:
    """Whether a group's fold, uncut, is a Kronecker product that acts on the channels of its only site."""
    if fold.num_dense == 0 or not shapes == (fold.axes,) == ((site.out, site.fan_in),):
        return False
    return site.out % fold.dense_product_size == 0 and site.channels_in % fold.dense_product_size == 0
