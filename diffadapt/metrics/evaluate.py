"""One metric on two sets, with what makes the number honest: sizes, interval, floor, notes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from diffadapt.metrics.diversity import Distance
from diffadapt.metrics.inputs import Inputs
from diffadapt.metrics.intervals import Estimate
from diffadapt.metrics.jobs import Job
from diffadapt.metrics.metric import Metric
from diffadapt.metrics.policy import check_size, common_size
from diffadapt.metrics.registry import METRICS


@dataclass(frozen=True)
class Evaluation:
    """A metric's outcome.

    Attributes:
        values: score -> value and interval.
        n: images used, {"generated": 500, "real": 500}; "real" is missing where no reference was read.
        floor: score -> what real images get: the value between two halves of the reference, or of the
            reference itself. None where there is none.
        floor_n: images in each set of the floor.
        options: all options, for the score's identity.
        notes: what limits the numbers.
    """

    values: Mapping[str, Estimate]
    n: Mapping[str, int]
    floor: Mapping[str, float] | None
    floor_n: int | None
    options: Mapping[str, object]
    notes: tuple[str, ...]


def evaluate(
    key: str,
    *,
    generated: Inputs,
    real: Inputs | None = None,
    seed: int = 0,
    allow_small: bool = False,
    intervals: bool = True,
    floor: bool = True,
    equalise: bool = True,
    network: Distance | None = None,
    **options: object,
) -> Evaluation:
    """The scores of one metric of `METRICS`.

    Args:
        real: the reference; may be left out where `METRICS[key].real` is empty, and then only serves as the
            floor.
        seed: of subsets, bootstraps, probes and the floor's halves.
        allow_small: score below the minimum number of images, stamped "not comparable".
        intervals, floor: leave out what takes more time than the value.
        equalise: cut both sets to one size where the value moves with it; False warns instead.
        network: distance of two images, for `lpips_diversity`.
        options: of the metric, see `METRICS[key].options`.
    Raises: ValueError for an unknown metric or option, a missing role, NaN; of it TooFewImages.
    """
    metric = _metric(key)
    options = _complete(metric, options)
    _require_roles(metric, generated, real)
    notes = _check_sizes(metric, generated, real, options, allow_small)
    if metric.real:
        generated, real, more = _sized(metric, generated, real, equalise, seed)
        notes += more
    job = Job(generated, real, options, seed, network)
    estimates = metric.estimate(job) if intervals else tuple(Estimate(value) for value in metric.value(job))
    floors, floor_n = _floor(metric, job) if floor and real is not None else (None, None)
    notes += _floor_note(floor_n, generated.n)
    n = {"generated": generated.n, **({"real": real.n} if metric.real and real.n is not None else {})}
    return Evaluation(dict(zip(metric.scores, estimates, strict=True)), n, floors, floor_n, options, notes)


def real_floor(
    key: str, *, real: Inputs, n: int, seed: int = 0, network: Distance | None = None, **options: object
) -> tuple[dict[str, float] | None, int | None]:
    """What real images get, for sets of at most `n`: (score -> value, images in each set), or (None, None).

    For most metrics the value between two disjoint random halves of the reference: a generator as good as
        the reference
    reaches it, and no more. Metrics without a reference are taken of the reference itself.
    """
    metric = _metric(key)
    job = Job(real.sample(min(n, real.n), seed), real, _complete(metric, options), seed, network)
    return _floor(metric, job)


def _floor(metric: Metric, job: Job) -> tuple[dict[str, float] | None, int | None]:
    real = job.real
    if metric.floor == "" or real.n is None:
        return None, None
    if callable(metric.floor):
        return dict(zip(metric.scores, metric.floor(real), strict=True)), real.n
    if metric.floor == "self":
        if not set(metric.generated) <= set(real.roles):
            return None, None
        own = real.sample(min(real.n, job.generated.n), job.seed)
        return dict(zip(metric.scores, metric.value(replace(job, generated=own)), strict=True)), own.n
    n = min(job.generated.n, real.n // 2)
    first, second = real.halves(n, job.seed)
    try:
        found = metric.value(replace(job, generated=first, real=second))
    except ValueError:  # halves too small for the metric: subsets of 1000 of a reference of 1500
        return None, None
    return dict(zip(metric.scores, found, strict=True)), n


def _floor_note(floor_n: int | None, n: int) -> tuple[str, ...]:
    if floor_n is None or floor_n >= n:
        return ()
    return (f"floor of {floor_n} real images in each set, the score is of {n}",)


def _metric(key: str) -> Metric:
    if key not in METRICS:
        raise ValueError(f"unknown metric {key!r}; there are {', '.join(METRICS)}")
    return METRICS[key]


def _complete(metric: Metric, options: Mapping[str, object]) -> dict[str, object]:
    unknown = [name for name in options if name not in metric.options]
    if unknown:
        known = ", ".join(metric.options) or "none"
        raise ValueError(f"{metric.key} has no option {unknown[0]!r}; it has {known}")
    return {**metric.options, **options}


def _require_roles(metric: Metric, generated: Inputs, real: Inputs | None) -> None:
    if metric.real and real is None:
        raise ValueError(f"{metric.key} compares with real images; give a reference")
    for which, needed, inputs in (("generated", metric.generated, generated), ("real", metric.real, real)):
        missing = [role for role in needed if role not in inputs.roles]
        if missing:
            raise ValueError(f"{metric.key} needs {missing[0]!r} of the {which} images, got {inputs.roles}")


def _check_sizes(
    metric: Metric, generated: Inputs, real: Inputs | None, options: Mapping[str, object], allow_small: bool
) -> tuple[str, ...]:
    width = generated[metric.generated[0]].shape[-1]
    sizes = [("generated", generated.n, metric.minimum)]
    if metric.real and real.n is not None:
        sizes.append(("real", real.n, metric.minimum_real or metric.minimum))
    stamps = (
        check_size(metric.key, role, n, minimum(width, options), allow_small=allow_small)
        for role, n, minimum in sizes
    )
    notes = [stamp for stamp in stamps if stamp]
    if metric.real == ("statistics",) and real.statistics.note:
        notes.append(real.statistics.note)
    return tuple(notes)


def _sized(
    metric: Metric, generated: Inputs, real: Inputs, equalise: bool, seed: int
) -> tuple[Inputs, Inputs, tuple[str, ...]]:
    if not metric.equal_n:
        return generated, real, ()
    n, n_real, note = common_size(metric.key, generated.n, real.n, equalise=equalise)
    return generated.sample(n, seed), real.sample(n_real, seed), (note,) if note else ()
