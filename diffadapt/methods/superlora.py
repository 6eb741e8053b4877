"""SuperLoRA: the changes of many layers as groups of one long vector (Chen et al. 2024, arXiv 2403.11887)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffadapt.algebra.expression import Expression, Update
from diffadapt.methods.base import Shapes
from diffadapt.methods.grouped.fastfood import PROJECTIONS
from diffadapt.methods.grouped.folds import Fold
from diffadapt.methods.grouped.grouping import Group, ceil_share, group_sites, smallest_root
from diffadapt.methods.grouped.plan import AdapterPlan, plan_groups
from diffadapt.methods.ranked import RankedMethod, check_choice
from diffadapt.methods.site import Site


@dataclass(frozen=True)
class SuperLoRA(RankedMethod):
    """`dW_group = F( (x)_k C_k x1 A_k1 ... xM A_kM )`, cut into the layers' weights.

    The weights of all sites are read one behind the other and cut into groups of N entries. A group is folded
    into `M = tensor_order` equal sides `d`, the smallest with `d^M >= ceil(rho N)`; surplus is dropped.

    Parameters of a group, for r < d:
        M = 1 (a vector): rho N
        M = 2: 2 d r; not reshaped: (width + ceil(rho N / width)) r, which is LoRA for `groups="weight"`
        M >= 3: M d r + r^M (Tucker) or M d r (CP)
        K Kronecker factors: (K - 1) b^2, and the last as for M = 2 over both sides divided by b^(K - 1),
        rounded up

    Frozen projections F store nothing, and equal groups share one. With tanhshrink the tensors start where it
    has a slope, and the start's output is subtracted. Sites keep the order they have when attached.

    Source: arXiv 2403.11887, appendices A.2 and A.10. Choices the paper leaves open: the order of sites,
    N_in = ceil(rho N), one group size rounded up for all, dense middle Kronecker factors, starting values.
    """

    name: ClassVar[str] = "superlora"
    learning_rate: ClassVar[float] = 1e-3  # as FLoRA's; the paper's is in none of its appendices
    grouped: ClassVar[bool] = True

    groups: str | int = "weight"  # weight, layer (all weights of one parent module), or a number of groups
    tensor_order: int = 2  # M, sides of the fold: 1 (a dense vector) to 5
    reshape: bool = True  # fold into equal sides; else rows as wide as the widest layer's
    core: str = "tucker"  # of three sides or more: tucker or cp
    kron_factors: int = 1  # K, 1 to 4: the last is low rank, those before it dense
    kron_block: int = 8  # b, the size of the dense ones
    rho: float = 1.0  # entries before the projection per entry after it, in (0, 1]
    projection: str = "none"  # none, shuffle, linear, linear_v2, nonlinear or nonlinear_v2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_groups()
        check_choice("core", self.core, ("tucker", "cp"))
        check_choice("projection", self.projection, PROJECTIONS)
        for option, most in (("tensor_order", 5), ("kron_factors", 4), ("kron_block", 512)):
            if not 1 <= getattr(self, option) <= most:
                raise ValueError(f"superlora: {option} must be in 1..{most}, got {getattr(self, option)}")
        if not 0 < self.rho <= 1:
            raise ValueError(f"superlora: rho must be in (0, 1], got {self.rho}")
        if self.rho != 1 and self.projection in ("none", "shuffle"):
            raise ValueError(
                f"superlora: projection={self.projection} needs rho=1, got rho={self.rho}; "
                "use a linear or nonlinear projection to train fewer entries"
            )
        if self.tensor_order == 1 and self.alpha is not None:
            raise ValueError(
                f"superlora: alpha={self.alpha} is divided by the rank, and tensor_order=1 has none; give "
                "scale"
            )
        if self.tensor_order != 2 and not self.reshape:
            raise ValueError(f"superlora: reshape=False needs tensor_order=2, got {self.tensor_order}")
        if self.tensor_order != 2 and self.kron_factors != 1:
            raise ValueError(
                f"superlora: kron_factors={self.kron_factors} needs tensor_order=2, got {self.tensor_order}"
            )

    def trained_tensors(self, site: Site) -> Shapes:
        return {}  # all tensors are shared

    def shared_tensors(self, sites: Sequence[Site]) -> Shapes:
        shapes: Shapes = {}
        for group_plan in self.plan_changes(sites).groups:
            shapes |= group_plan.trained_tensors
        return shapes

    def constants(self, sites: Sequence[Site], seed: int) -> dict[str, Tensor]:
        constants: dict[str, Tensor] = {}
        for group_plan in self.plan_changes(sites).groups:
            constants |= group_plan.constants(seed)
        return constants

    def init_shared_tensors(
        self, sites: Sequence[Site], bases: Sequence[Tensor], tensors: Mapping[str, Tensor], seed: int
    ) -> None:
        for group_plan in self.plan_changes(sites).groups:
            group_plan.init_tensors(tensors, seed)

    def plan_changes(self, sites: Sequence[Site]) -> AdapterPlan:
        groups = group_sites(sites, self.groups)
        folds = [self._fold(group, sites) for group in groups]
        return plan_groups(sites, groups, folds, self.projection)

    def compute_changes(self, plan: AdapterPlan, tensors: Mapping[str, Tensor]) -> list[Expression]:
        return plan.changes(tensors)

    def has_weight_decay(self, key: str) -> bool:
        return not self.projection.startswith("nonlinear")  # the output of the start is subtracted

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        return Update(tensors["change"], self.multiplier)

    def _fold(self, group: Group, sites: Sequence[Site]) -> Fold:
        """How the tensors of a group make its entries.

        Raises:
            ValueError: the rank is too large for the group.
        """
        entries = ceil_share(group.size, self.rho)
        if self.tensor_order == 1:
            return Fold(entries, (entries,))
        if self.reshape:
            axes = (smallest_root(entries, self.tensor_order),) * self.tensor_order
        else:
            axes = (-(-entries // group.width), group.width)  # rounded up
        first_site = sites[group.pieces[0].site].name
        if self.rank >= min(axes):
            raise ValueError(
                f"superlora: rank must be below {min(axes)}, the shortest side of the group of {first_site} "
                f"({_sides(axes)}), got {self.rank}; lower the rank or the tensor order, or use fewer groups"
            )
        fold = Fold(entries, axes, self.rank, self.core, self.kron_factors - 1, self.kron_block)
        if self.kron_factors > 1 and self.rank > min(fold.low_rank_shape):
            raise ValueError(
                f"superlora: rank must be at most {min(fold.low_rank_shape)}, the shortest side of the last "
                f"Kronecker factor of the group of {first_site} ({_sides(fold.low_rank_shape)}), got "
                f"{self.rank}; lower the rank, kron_factors or kron_block, or use fewer groups"
            )
        return fold

    def _check_groups(self) -> None:
        if self.groups in ("weight", "layer"):
            return
        if not isinstance(self.groups, int) or self.groups < 1:
            raise ValueError(f"superlora: groups must be weight, layer or a number >= 1, got {self.groups!r}")


def _sides(axes: Sequence[int]) -> str:
    """Sizes for a message, e.g. `12 x 12`."""
    return " x ".join(map(str, axes))
