"""One metric on two sets, with what makes the number honest: sizes, interval, floor, notes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from diffadapt.metrics.bindings import MetricCall
from diffadapt.metrics.diversity import Distance
from diffadapt.metrics.feature_set import FeatureSet
from diffadapt.metrics.intervals import Estimate
from diffadapt.metrics.metric import Metric
from diffadapt.metrics.metric_options import check_options
from diffadapt.metrics.registry import METRICS
from diffadapt.metrics.sample_size import check_size, common_size


@dataclass(frozen=True)
class Floor:
    """What real images get.

    Attributes:
        values: score -> value.
        n: real images in the place of the generated ones.
        n_real: real images in the place of the reference; None where there is no second set.
        note: the sizes, and how the value was corrected for them; "" where nothing is to be said.
    """

    values: Mapping[str, float]
    n: int
    n_real: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Evaluation:
    """A metric's outcome.

    Attributes:
        values: score -> value and interval.
        n: images used, {"generated": 500, "real": 500}; "real" is missing where no reference was read.
        floor: score -> what real images get, at the sizes of the score. None where there is none.
        floor_n: real images that stand in the place of the generated ones in the floor.
        options: all options, for the score's identity.
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
    generated: FeatureSet,
    real: FeatureSet | None = None,
    train: FeatureSet | None = None,
    seed: int = 0,
    allow_small: bool = False,
    intervals: bool = True,
    floor: bool = True,
    equalise: bool = True,
    network: Distance | None = None,
    metric_options: Mapping[str, object] | None = None,
    **options: object,
) -> Evaluation:
    """The scores of one metric of `METRICS`.

    An interval that cannot be found is left out, with a note; the value stays.

    Args:
        real: the reference; may be left out where `METRICS[key].real` is empty, and then only serves as the
            floor.
        train: the images that the generator was trained on, where `METRICS[key].train` asks for them.
        seed: of subsets, bootstraps, probes and the floor's halves.
        allow_small: score below the minimum number of images, stamped "not comparable".
        intervals, floor: leave out what takes more time than the value.
        equalise: cut both sets to one size where the value moves with it; False warns instead.
        network: distance of two images, for `lpips_diversity`.
        metric_options: of the metric, see `METRICS[key].options`; the only way to give one called `seed`.
        options: the same by keyword.
    Raises: ValueError for an unknown metric or option, a value out of range, a missing role, NaN;
        of it TooFewImages.
    """
    metric = _metric(key)
    options = _complete(metric, {**(metric_options or {}), **options})
    _require_roles(metric, {"generated": generated, "real": real, "training": train})
    notes = _check_sizes(metric, generated, real, train, options, allow_small)
    reference = real
    if metric.real:
        generated, real, more = _sized(metric, generated, real, equalise, seed)
        notes += more
    call = MetricCall(generated, real, options, seed, network, train)
    estimates, more = _estimates(metric, call) if intervals else (_bare(metric.value(call)), ())
    notes += more
    found = _floor(metric, call, reference) if floor and reference is not None else None
    if isinstance(found, str):
        notes += (found,)
        found = None
    elif found is not None and found.note:
        notes += (found.note,)
    n = {"generated": generated.n}
    if metric.real and real.count(metric.real[0]) is not None:
        n["real"] = real.count(metric.real[0])
    if metric.train:
        n["training"] = train.n
    floors = None if found is None else found.values
    floor_n = None if found is None else found.n
    return Evaluation(dict(zip(metric.scores, estimates, strict=True)), n, floors, floor_n, options, notes)


def _bare(values: tuple[float, ...]) -> tuple[Estimate, ...]:
    return tuple(Estimate(value) for value in values)


def _estimates(metric: Metric, call: MetricCall) -> tuple[tuple[Estimate, ...], tuple[str, ...]]:
    """Values with intervals; where the intervals fail the values alone, and a note why."""
    try:
        return metric.estimate(call), ()
    except ValueError as error:
        return _bare(metric.value(call)), (f"no interval: {error}",)


def real_floor(
    key: str, *, real: FeatureSet, n: int, seed: int = 0, network: Distance | None = None, **options: object
) -> tuple[dict[str, float] | None, int | None]:
    """What real images get in the place of `n` generated ones, scored against all of the reference.

    Returns: score -> value, and the real images that stood in for generated ones; (None, None) where real
        images cannot give it.
    """
    metric = _metric(key)
    generated = real.sample(min(n, real.n), seed)
    found = _floor(metric, MetricCall(generated, real, _complete(metric, options), seed, network), real)
    if found is None or isinstance(found, str):
        return None, None
    return dict(found.values), found.n


def _floor(metric: Metric, call: MetricCall, reference: FeatureSet) -> Floor | str | None:
    """The floor; a note where real images cannot give one at the sizes of the score; None where there is
    none.

    Args:
        call: of the score, its real images cut to one size with the generated ones where the metric asks
            that.
        reference: all real images.
    """
    if metric.floor == "" or reference.n is None:
        return None
    if callable(metric.floor):
        return Floor(dict(zip(metric.scores, metric.floor(reference), strict=True)), reference.n)
    if metric.floor in ("self", "self_any"):
        return _floor_of_one_set(metric, call, reference)
    return _floor_of_two_parts(metric, call, reference)


def _floor_of_one_set(metric: Metric, call: MetricCall, reference: FeatureSet) -> Floor | str | None:
    """The metric of real images alone, as many as were generated."""
    if not set(metric.generated) <= set(reference.roles):
        return None
    if metric.floor == "self" and reference.n < call.generated.n:
        return f"no floor: it would take {call.generated.n} real images, there are {reference.n}"
    sample = reference.sample(min(reference.n, call.generated.n), call.seed)
    values = metric.value(replace(call, generated=sample))
    note = f"floor of {sample.n} real images" if sample.n < call.generated.n else ""
    return Floor(dict(zip(metric.scores, values, strict=True)), sample.n, note=note)


def _floor_of_two_parts(metric: Metric, call: MetricCall, reference: FeatureSet) -> Floor | str | None:
    """The metric between two disjoint random parts of the reference.

    A part of n real images takes the place of n generated ones, the rest that of the reference. Where the
    reference is not larger than 2 n it is halved.
    """
    if any(reference.is_imported(role) for role in metric.real):
        return "no floor: the images behind the published statistics are not at hand"
    n_generated, n_real = call.generated.n, call.real.n
    if metric.floor == "sizes":
        n, m = n_generated, n_real
        if n + m > reference.n:
            return (
                f"no floor: it would take {n} and {m} different real images, the reference has {reference.n}"
            )
    else:
        n = min(n_generated, reference.n // 2)
        m = reference.n - n
    first, second = reference.parts(n, m, call.seed)
    try:
        values = metric.value(replace(call, generated=first, real=second))
    except ValueError as error:  # parts too small for the metric: subsets of 1000 of a reference of 1500
        return f"no floor: {error}"
    note = f"floor of {n} against {m} other real images"
    if metric.bias is not None:
        factor = metric.bias(n_generated, n_real) / metric.bias(n, m)
        values = tuple(value * factor for value in values)
        note += f", its sampling bias scaled by {factor:.3g} to {n_generated} against {n_real}"
    return Floor(dict(zip(metric.scores, values, strict=True)), n, m, note)


def _metric(key: str) -> Metric:
    if key not in METRICS:
        raise ValueError(f"unknown metric {key!r}; there are {', '.join(METRICS)}")
    return METRICS[key]


def _complete(metric: Metric, options: Mapping[str, object]) -> dict[str, object]:
    check_options(metric.key, options, metric.options)
    return {**metric.options, **options}


def _require_roles(metric: Metric, sets: Mapping[str, FeatureSet | None]) -> None:
    """Raises: ValueError for a set or a role that the metric reads and that is not there."""
    if metric.real and sets["real"] is None:
        raise ValueError(f"{metric.key} compares with real images; give a reference")
    if metric.train and sets["training"] is None:
        raise ValueError(f"{metric.key} compares with the images trained on; give them with --train")
    for which, needed in (("generated", metric.generated), ("real", metric.real), ("training", metric.train)):
        inputs = sets[which]
        missing = [role for role in needed if role not in inputs.roles]
        if missing:
            raise ValueError(f"{metric.key} needs {missing[0]!r} of the {which} images, got {inputs.roles}")


def _check_sizes(
    metric: Metric,
    generated: FeatureSet,
    real: FeatureSet | None,
    train: FeatureSet | None,
    options: Mapping[str, object],
    allow_small: bool,
) -> tuple[str, ...]:
    width = generated[metric.generated[0]].shape[-1]
    sizes = [("generated", generated.n, metric.minimum)]
    of_real = metric.minimum_real or metric.minimum
    if metric.real and real.count(metric.real[0]) is not None:
        sizes.append(("real", real.count(metric.real[0]), of_real))
    if metric.train:
        sizes.append(("training", train.n, of_real))
    stamps = (
        check_size(metric.key, role, n, minimum(width, options), allow_small=allow_small)
        for role, n, minimum in sizes
    )
    notes = [stamp for stamp in stamps if stamp]
    imported = [role for role in metric.real if real.is_imported(role)]
    notes += [real.statistics_of(role).note for role in imported if real.statistics_of(role).note]
    return tuple(notes)


def _sized(
    metric: Metric, generated: FeatureSet, real: FeatureSet, equalise: bool, seed: int
) -> tuple[FeatureSet, FeatureSet, tuple[str, ...]]:
    if not metric.equal_n:
        return generated, real, ()
    n, n_real, note = common_size(metric.key, generated.n, real.n, equalise=equalise)
    return generated.sample(n, seed), real.sample(n_real, seed), (note,) if note else ()
