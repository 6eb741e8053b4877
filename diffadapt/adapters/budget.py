"""Parameters of an adapter before it exists: tables per block, and the rank that fits a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from diffadapt.adapters.attach import Targets, choose_sites
from diffadapt.adapters.method_state import MethodPlan, plan_methods
from diffadapt.adapters.targets import assign_ranks
from diffadapt.methods import Method
from diffadapt.methods.parse_method import make_method, option_names
from diffadapt.methods.peft_config import PREFIX as PEFT

_MOST = 2**20  # no rank above this is tried


@dataclass(frozen=True)
class ParameterTable:
    """What a method would train.

    Attributes:
        blocks: (name of the block, number of sites, trained parameters), in the model's order; tensors that
            several blocks share come last under ``shared``.
        base: parameters of the adapted models.
    """

    blocks: tuple[tuple[str, int, int], ...]
    base: int

    @property
    def total(self) -> int:
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
    """What ``attach`` with the same arguments would train, from shapes alone: the meta device will do.

    ``depth`` is how many pieces of a site's name make a block.
    """
    roots, found = choose_sites(model, method, targets, text_encoder_targets)
    sites = [choice.site for choice in found]
    ranks = assign_ranks(sites, rank_patterns or {})
    rows: dict[str, list[int]] = {}
    for plan in plan_methods(method, sites, ranks):
        for site in plan.sites:
            rows.setdefault(_block(site.name, depth), [0, 0])[0] += 1
        for key, count in plan.counts().items():
            name = key.split("/")[1]
            rows.setdefault(_block(name, depth) if name else "shared", [0, 0])[1] += count
    base = sum(p.numel() for module in roots.values() for p in module.parameters())
    return ParameterTable(tuple((name, sites, count) for name, (sites, count) in rows.items()), base)


def fit_budget(
    model: object,
    method: str,
    targets: Targets = "attention",
    *,
    budget: int,
    text_encoder_targets: Targets | None = None,
    **options: object,
) -> Method:
    """The method with the largest rank whose trained parameters do not exceed ``budget``.

    Args:
        method: a registered name or combination; ``options`` as in ``make_method``, without ``rank``.
        budget: trained parameters.

    Raises: ValueError when the method has no rank, or when rank 1 does not fit.
    """
    if method.startswith(PEFT) or "rank" not in option_names(method):
        raise ValueError(f"{method} has no rank to choose, so a budget does not apply to it")
    _, found = choose_sites(model, make_method(method, **options), targets, text_encoder_targets)
    sites = [choice.site for choice in found]

    def count(rank: int) -> int | None:
        """Parameters at a rank; None above what the method accepts."""
        try:
            chosen = make_method(method, rank=rank, **options)
            return sum(plan.num_parameters for plan in plan_methods(chosen, sites))
        except ValueError:
            if rank == 1:
                raise
            return None

    least = count(1)
    if least > budget:
        raise ValueError(f"{method} needs {least:,} parameters at rank 1, more than the budget of {budget:,}")
    if count(2) == least == count(_MOST):
        raise ValueError(
            f"{method} has {least:,} parameters at every rank; leave out the budget or its own rank"
        )
    plans = plan_methods(make_method(method, rank=1, **options), sites)
    falls = {
        rank
        for plan in plans
        for site in plan.sites
        for rank in plan.methods[0].ranks_where_count_drops(site)
    }
    return make_method(method, rank=_largest_within(count, falls, budget), **options)


def size_notices(
    model: object,
    method: Method,
    targets: Targets = "attention",
    *,
    text_encoder_targets: Targets | None = None,
) -> list[str]:
    """Lines where a method is larger than what it adapts: its rank than the layers, or all it trains than
    their weights. A change of a matrix (n, m) has at most the rank min(n, m)."""
    roots, choices = choose_sites(model, method, targets, text_encoder_targets)
    sites = [choice.site for choice in choices]
    notices = []
    for plan in plan_methods(method, sites):
        notices += _rank_notices(plan)
    trained = sum(plan.num_parameters for plan in plan_methods(method, sites))
    adapted = sum(math.prod(site.shape) for site in sites)
    base = sum(p.numel() for root in roots.values() for p in root.parameters())
    if trained > adapted:
        share = f", {trained / base:.0%} of the base" if trained > base else ""
        notices.append(
            f"{method} has {trained:,} trained parameters{share}; the layers it adapts have {adapted:,} "
            "weights, so --adapter full would train fewer"
        )
    return notices


def _rank_notices(plan: MethodPlan) -> list[str]:
    rank = getattr(plan.methods[0], "rank", None)
    if rank is None or plan.methods[0].grouped:
        return []
    largest = {site.name: min(site.shape[0], math.prod(site.shape[1:])) for site in plan.sites}
    exceeded = [name for name, size in largest.items() if rank > size]
    if not exceeded:
        return []
    smallest = min(exceeded, key=largest.__getitem__)
    method = plan.methods[0].name
    return [
        f"rank {rank} of {method} is above the size of {len(exceeded)} of {len(largest)} layers (no change "
        f"of {smallest} has a rank above {largest[smallest]}); a smaller --param_budget may do"
    ]


def _largest_within(count: Callable[[int], int | None], falls: Collection[int], budget: int) -> int:
    """The largest rank with at most ``budget`` parameters; the first of those that train the most, where the
    parameters stop growing before.

    Args:
        falls: the ranks at which the parameters may become fewer; between two of them they never do.
    """

    def fits(rank: int) -> bool:
        parameters = count(rank)
        return parameters is not None and parameters <= budget

    starts = [1, *sorted(rank for rank in falls if 1 < rank <= _MOST)]
    ends = [*(start - 1 for start in starts[1:]), _MOST]
    start, end = next(bounds for bounds in reversed(list(zip(starts, ends, strict=True))) if fits(bounds[0]))
    rank = _last(fits, start, end)
    if rank < _MOST:
        return rank
    most = count(_MOST)
    return start if count(start) == most else _last(lambda rank: count(rank) < most, start, end) + 1


def _last(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest rank of ``low..high`` for which something holds, given that it holds up to there."""
    while low < high:
        middle = min(2 * low, (low + high + 1) // 2)
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def parse_budget(text: str) -> int:
    """``500000``, ``500k`` or ``1.5M`` as a number. Raises ValueError for anything else."""
    factor = {"k": 10**3, "m": 10**6, "g": 10**9}.get(text[-1:].lower(), 1)
    try:
        value = float(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        value = 0
    if not 1 <= value < 10**15:
        raise ValueError(f"a budget is a number of parameters such as 500000, 500k or 1.5M, got {text!r}")
    return int(value)


def _block(name: str, depth: int) -> str:
    return ".".join(name.split(".")[:depth])
