"""Parameters of an adapter before it exists: tables per block, and the rank that fits a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from diffadapt.adapters.attach import Targets, choose_sites
from diffadapt.adapters.method_state import MethodPlan, plan_methods
from diffadapt.adapters.quantised_layers import count_base_parameters
from diffadapt.adapters.targets import assign_ranks
from diffadapt.methods import Method
from diffadapt.methods.parse_method import make_method, option_names
from diffadapt.methods.peft_config import PREFIX as PEFT

_LARGEST_RANK = 2**20  # no rank above this is tried
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}


@dataclass(frozen=True)
class ParameterTable:
    """The number of values that a method would train.

    Attributes:
        blocks: (name of the block, number of sites, trained parameters), in the model's order; tensors that
            several blocks share come last under `shared`.
        base: parameters of the adapted models.
    """

    blocks: tuple[tuple[str, int, int], ...]
    base: int

    @property
    def total(self) -> int:
        """Trained parameters."""
        return sum(count for _, _, count in self.blocks)

    @property
    def percent(self) -> float:
        """Trained parameters in percent of the base's."""
        return 100 * self.total / self.base

    @property
    def bytes(self) -> int:
        """Size of the trained tensors in float32."""
        return 4 * self.total


def count_parameters(
    model: object,
    method: Method,
    targets: Targets = "attention",
    *,
    text_encoder_targets: Targets | None = None,
    rank_patterns: Mapping[str, int] | None = None,
    depth: int = 2,
) -> ParameterTable:
    """Counts what `attach` with the same arguments would train, from shapes alone: the meta device will do.

    Args:
        model: as for `attach`.
        method: as for `attach`.
        targets: as for `attach`.
        text_encoder_targets: as for `attach`.
        rank_patterns: as for `attach`.
        depth: the number of pieces of a site's name that make a block.
    """
    roots, target_sites = choose_sites(model, method, targets, text_encoder_targets)
    sites = [target.site for target in target_sites]
    ranks = assign_ranks(sites, rank_patterns or {})
    num_sites: dict[str, int] = {}
    num_parameters: dict[str, int] = {}  # of the same blocks, and of those tensors that blocks share
    for plan in plan_methods(method, sites, ranks):
        for site in plan.sites:
            block = _block(site.name, depth)
            num_sites[block] = num_sites.get(block, 0) + 1
            num_parameters.setdefault(block, 0)
        for tensor_name, count in plan.counts().items():
            site_name = tensor_name.split("/")[1]  # of "label/site/tensor"; empty in "label//tensor"
            block = _block(site_name, depth) if site_name else "shared"
            num_parameters[block] = num_parameters.get(block, 0) + count
    blocks = []
    for block, count in num_parameters.items():
        blocks.append((block, num_sites.get(block, 0), count))  # no sites for "shared"
    return ParameterTable(tuple(blocks), _count_base(roots.values()))


def fit_budget(
    model: object,
    method: str,
    targets: Targets = "attention",
    *,
    budget: int,
    text_encoder_targets: Targets | None = None,
    **options: object,
) -> Method:
    """The method with the largest rank whose trained parameters do not exceed a budget.

    Args:
        model: as for `attach`.
        method: a registered name or combination.
        targets: as for `attach`.
        budget: trained parameters.
        text_encoder_targets: as for `attach`.
        **options: as for `make_method`, without `rank`.

    Raises:
        ValueError: the method has no rank, or rank 1 does not fit.
    """
    if method.startswith(PEFT) or "rank" not in option_names(method):
        raise ValueError(f"{method} has no rank to choose, so a budget does not apply to it")
    _, target_sites = choose_sites(model, make_method(method, **options), targets, text_encoder_targets)
    sites = [target.site for target in target_sites]

    def count(rank: int) -> int | None:
        """Parameters at a rank; None above what the method accepts."""
        try:
            return _count_trained(plan_methods(make_method(method, rank=rank, **options), sites))
        except ValueError:
            if rank == 1:  # then it is not the rank that the method refuses
                raise
            return None

    smallest = count(1)
    if smallest > budget:
        raise ValueError(
            f"{method} needs {smallest:,} parameters at rank 1, more than the budget of {budget:,}"
        )
    # the rank changes nothing where an option such as `lora(rank=3)` fixes it
    if count(2) == smallest == count(_LARGEST_RANK):
        raise ValueError(
            f"{method} has {smallest:,} parameters at every rank; leave out the budget or its own rank"
        )
    # e.g. the ranks from which on the right factor of LoKr is dense, with fewer values than two thin factors
    drops: set[int] = set()
    for plan in plan_methods(make_method(method, rank=1, **options), sites):
        for site in plan.sites:
            drops.update(plan.methods[0].ranks_where_count_drops(site))
    return make_method(method, rank=_largest_rank_within(count, drops, budget), **options)


def size_notices(
    model: object,
    method: Method,
    targets: Targets = "attention",
    *,
    text_encoder_targets: Targets | None = None,
) -> list[str]:
    """Notices where a method is larger than what it adapts.

    Its rank may be above the size of layers (a change of a matrix (n, m) has at most the rank min(n, m)), or
    its trained parameters may be more than the weights of the layers.

    Args:
        model: as for `attach`.
        method: as for `attach`.
        targets: as for `attach`.
        text_encoder_targets: as for `attach`.

    Returns:
        Lines to print; none where all is well.
    """
    roots, target_sites = choose_sites(model, method, targets, text_encoder_targets)
    sites = [target.site for target in target_sites]
    plans = plan_methods(method, sites)
    notices = []
    for plan in plans:
        notices += _rank_notices(plan)
    trained = _count_trained(plans)
    adapted = sum(math.prod(site.shape) for site in sites)
    base = _count_base(roots.values())
    if trained > adapted:  # as small layers have it at high ranks: r (n + m) > n m
        share = f", {trained / base:.0%} of the base" if trained > base else ""
        notices.append(
            f"{method} has {trained:,} trained parameters{share}; the layers it adapts have {adapted:,} "
            "weights, so --adapter full would train fewer"
        )
    return notices


def parse_budget(text: str) -> int:
    """Reads `500000`, `500k` or `1.5M` as a number.

    Raises:
        ValueError: the text has another form.
    """
    unit = _UNITS.get(text[-1:].lower())
    number = text if unit is None else text[:-1]
    try:
        value = float(number) * (unit or 1)
    except ValueError:
        value = 0  # out of the range below, as NaN and infinity are
    if not 1 <= value < 10**15:
        raise ValueError(f"a budget is a number of parameters such as 500000, 500k or 1.5M, got {text!r}")
    return int(value)


def _rank_notices(plan: MethodPlan) -> list[str]:
    """A line where the rank of a method is above the size of layers."""
    method = plan.methods[0]
    rank = getattr(method, "rank", None)
    if rank is None or method.grouped:  # a grouped method's rank is that of a tensor across layers
        return []
    largest_rank = {}
    exceeded = []
    for site in plan.sites:
        largest_rank[site.name] = min(site.out, site.fan_in)  # of any matrix (out, fan_in)
        if rank > largest_rank[site.name]:
            exceeded.append(site.name)
    if not exceeded:
        return []
    smallest_layer = min(exceeded, key=largest_rank.__getitem__)
    return [
        f"rank {rank} of {method.name} is above the size of {len(exceeded)} of {len(largest_rank)} layers "
        f"(no change of {smallest_layer} has a rank above {largest_rank[smallest_layer]}); a smaller "
        "--param_budget may do"
    ]


def _largest_rank_within(count: Callable[[int], int | None], drops: Collection[int], budget: int) -> int:
    """The largest rank with at most `budget` parameters.

    Where the parameters stop growing before that, it is the first rank of those that train the most.

    Args:
        count: parameters at a rank; None above what the method accepts.
        drops: the ranks at which the parameters may become fewer; between two of them they never do.
        budget: trained parameters.
    """

    def fits(rank: int) -> bool:
        parameters = count(rank)
        return parameters is not None and parameters <= budget

    # Between two drops the parameters never become fewer, so a bisection finds the largest rank that fits.
    # The interval that holds it is the last one whose first rank fits.
    starts = [1]
    for rank in sorted(drops):
        if 1 < rank <= _LARGEST_RANK:
            starts.append(rank)
    end = _LARGEST_RANK
    while not fits(starts[-1]):
        end = starts.pop() - 1
    start = starts[-1]
    rank = _last_rank(fits, start, end)
    if rank < _LARGEST_RANK:
        return rank
    # Every rank fits, so the method stops growing somewhere, as LoKr does where its right factors are dense.
    most_parameters = count(_LARGEST_RANK)
    if count(start) == most_parameters:
        return start
    return _last_rank(lambda rank: count(rank) < most_parameters, start, end) + 1


def _last_rank(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest rank of `low..high` for which something holds, given that it holds up to there."""
    while low < high:
        # doubles at first: large ranks cost more to count, and some methods refuse them
        middle = min(2 * low, (low + high + 1) // 2)
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _count_trained(plans: Iterable[MethodPlan]) -> int:
    """Parameters that methods would train."""
    return sum(plan.num_parameters for plan in plans)


def _count_base(roots: Iterable[nn.Module]) -> int:
    """Parameters of the adapted models."""
    return sum(count_base_parameters(root) for root in roots)


def _block(name: str, depth: int) -> str:
    """The first pieces of a site's name."""
    return ".".join(name.split(".")[:depth])
