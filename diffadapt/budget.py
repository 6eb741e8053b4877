"""Parameters of an adapter before it exists: tables per block, and the rank that fits a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from diffadapt.attaching import Targets, choose_sites
from diffadapt.method_names import make_method, options_of
from diffadapt.methods import Method
from diffadapt.methods.peft_method import PREFIX as PEFT
from diffadapt.parts import plan_parts
from diffadapt.targets import assign_ranks

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
    for plan in plan_parts(method, sites, ranks):
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
    if method.startswith(PEFT) or "rank" not in options_of(method):
        raise ValueError(f"{method} has no rank to choose, so a budget does not apply to it")
    _, found = choose_sites(model, make_method(method, **options), targets, text_encoder_targets)
    sites = [choice.site for choice in found]

    def count(rank: int) -> int | None:
        """Parameters at a rank; None above what the method accepts."""
        try:
            chosen = make_method(method, rank=rank, **options)
            return sum(plan.num_parameters for plan in plan_parts(chosen, sites))
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
    return make_method(method, rank=_largest_within(count, budget), **options)


def _largest_within(count: Callable[[int], int | None], budget: int) -> int:
    """The largest rank with at most ``budget`` parameters; the first of those that train the most, where the
    parameters stop growing before."""
    rank = _last(lambda rank: (trial := count(rank)) is not None and trial <= budget)
    if rank < _MOST:
        return rank
    most = count(_MOST)
    return _last(lambda rank: count(rank) < most) + 1


def _last(holds: Callable[[int], bool]) -> int:
    """The largest rank up to the limit for which something holds, given that it holds up to there."""
    low, high = 1, 2
    while high <= _MOST and holds(high):
        low, high = high, 2 * high
    while high - low > 1 and low < _MOST:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
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
