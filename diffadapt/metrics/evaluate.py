"""One metric on two sets, with what makes the number honest: sizes, interval, floor, notes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

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
    """A metric of real images in the place of generated ones.

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
    """A metric's scores.

    Attributes:
        values: score -> value and interval.
        n: images used, {"generated": 500, "real": 500}; "real" is missing where no reference was read.
        floor: score -> what real images get, at the sizes of the score; None where there is none.
        floor_n: real images in the place of the generated ones in the floor.
        options: all options, for the score's identity.
        notes: what limits the number.
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
    """Computes the scores of one metric of `METRICS`.

    An interval that cannot be computed is left out, with a note; the value stays.

    Args:
        real: the reference; may be left out where `METRICS[key].real` is empty, and then only serves as the
            floor.
        train: the images that the generator was trained on, where `METRICS[key].train` asks for them.
        seed: of subsets, bootstraps, probes and the floor's halves.
        allow_small: score below the minimum number of images, stamped "not comparable".
        intervals, floor: False leaves out what takes more time than the value.
        equalise: cut both sets to one size where the value depends on it; False warns instead.
        network: distance of two images, for `lpips_diversity`.
        metric_options: options of the metric, see `METRICS[key].options`; the only way to give one called
            `seed`.
        options: the same by keyword.

    Raises:
        ValueError: the metric or an option is unknown, a value is out of range, a role is missing, or a
            feature is NaN.
        TooFewImages: a set is below the metric's minimum, and `allow_small` is not set; a ValueError too.
    """
    metric = _metric(key)
    options = _complete_options(metric, {**(metric_options or {}), **options})
    _require_roles(metric, {"generated": generated, "real": real, "training": train})
    notes = _check_sizes(metric, generated, real, train, options, allow_small)
    reference = real  # the whole set, which the floor is taken from
    if metric.real:
        generated, real, size_notes = _cut_to_one_size(metric, generated, real, equalise, seed)
        notes += size_notes
    call = MetricCall(generated, real, options, seed, network, train)
    if intervals:
        estimates, interval_notes = _estimates(metric, call)
        notes += interval_notes
    else:
        estimates = _without_intervals(metric, call)
    real_floor = None
    if floor and reference is not None:
        real_floor, floor_notes = _floor(metric, call, reference)
        notes += floor_notes
    n = {"generated": generated.n}
    if metric.real and real.count(metric.real[0]) is not None:
        n["real"] = real.count(metric.real[0])
    if metric.train:
        n["training"] = train.n
    return Evaluation(
        values=dict(zip(metric.scores, estimates, strict=True)),
        n=n,
        floor=None if real_floor is None else real_floor.values,
        floor_n=None if real_floor is None else real_floor.n,
        options=options,
        notes=tuple(notes),
    )


def metric_value(
    key: str, *, generated: Mapping[str, Tensor], real: Mapping[str, Tensor] | None = None
) -> float:
    """The value of a metric on a few images, without interval, floor or minimum, such as training prints.

    Args:
        generated, real: features by role (see `FeatureSet`).
    """
    result = evaluate(
        key,
        generated=FeatureSet(generated),
        real=None if real is None else FeatureSet(real),
        allow_small=True,
        intervals=False,
        floor=False,
    )
    return result.values[METRICS[key].scores[0]].value


def _without_intervals(metric: Metric, call: MetricCall) -> tuple[Estimate, ...]:
    estimates = []
    for value in metric.values(call):
        estimates.append(Estimate(value))
    return tuple(estimates)


def _estimates(metric: Metric, call: MetricCall) -> tuple[tuple[Estimate, ...], list[str]]:
    """Values with intervals; where the intervals fail the values alone, and a note why."""
    try:
        return metric.estimates(call), []
    except ValueError as error:
        return _without_intervals(metric, call), [f"no interval: {error}"]


def _floor(metric: Metric, call: MetricCall, reference: FeatureSet) -> tuple[Floor | None, list[str]]:
    """What real images get; None where real images cannot say it at the sizes of the score. And notes.

    Args:
        call: of the score, its real images cut to one size with the generated ones where the metric asks
            that.
        reference: all real images.
    """
    if metric.floor == "" or reference.n is None:
        return None, []
    if callable(metric.floor):
        value = metric.floor(reference)
        floor = None if value is None else Floor({metric.scores[0]: value}, reference.n)
        return floor, []
    try:
        if metric.floor in ("self", "self_any"):
            floor = _floor_of_one_set(metric, call, reference)
        else:
            floor = _floor_of_two_parts(metric, call, reference)
    except _NoFloor as error:
        return None, [f"no floor: {error}"]
    return floor, [floor.note] if floor is not None and floor.note else []


class _NoFloor(Exception):
    """Real images cannot give a floor at the sizes of the score."""


def _floor_of_one_set(metric: Metric, call: MetricCall, reference: FeatureSet) -> Floor | None:
    """The metric of real images alone, as many as were generated."""
    if not set(metric.generated) <= set(reference.roles):
        return None
    if metric.floor == "self" and reference.n < call.generated.n:
        raise _NoFloor(f"it would take {call.generated.n} real images, there are {reference.n}")
    sample = reference.sample(min(reference.n, call.generated.n), call.seed)
    values = metric.values(replace(call, generated=sample))
    note = f"floor of {sample.n} real images" if sample.n < call.generated.n else ""
    return Floor(dict(zip(metric.scores, values, strict=True)), sample.n, note=note)


def _floor_of_two_parts(metric: Metric, call: MetricCall, reference: FeatureSet) -> Floor:
    """The metric between two disjoint random parts of the reference.

    A part of n real images takes the place of n generated ones, the rest that of the reference. Where the
    reference is not larger than 2 n it is halved.
    """
    if any(reference.is_imported(role) for role in metric.real):
        raise _NoFloor("the images behind the published statistics are not at hand")
    n_generated = call.generated.n
    n_real = call.real.n
    if metric.floor == "sizes":
        n = n_generated
        m = n_real
        if n + m > reference.n:
            raise _NoFloor(
                f"it would take {n} and {m} different real images, the reference has {reference.n}"
            )
    else:
        n = min(n_generated, reference.n // 2)
        m = reference.n - n
    first, second = reference.parts(n, m, call.seed)  # (n, ...), (m, ...)
    try:
        values = metric.values(replace(call, generated=first, real=second))
    except ValueError as error:  # parts too small for the metric: subsets of 1000 of a reference of 1500
        raise _NoFloor(str(error)) from None
    note = f"floor of {n} against {m} other real images"
    if metric.bias is not None:
        # real against real is all bias, here brought from the sizes (n, m) to those of the score
        factor = metric.bias(n_generated, n_real) / metric.bias(n, m)
        values = tuple(value * factor for value in values)
        note += f", its sampling bias scaled by {factor:.3g} to {n_generated} against {n_real}"
    return Floor(dict(zip(metric.scores, values, strict=True)), n, m, note)


def _metric(key: str) -> Metric:
    """The registry's entry.

    Raises:
        ValueError: there is none of this name.
    """
    if key not in METRICS:
        raise ValueError(f"unknown metric {key!r}; there are {', '.join(METRICS)}")
    return METRICS[key]


def _complete_options(metric: Metric, options: Mapping[str, object]) -> dict[str, object]:
    """The options, checked, with the defaults of those that are not given."""
    check_options(metric.key, options, metric.options)
    return {**metric.options, **options}


def _require_roles(metric: Metric, sets: Mapping[str, FeatureSet | None]) -> None:
    """Checks that every set and every role that the metric reads is there.

    Raises:
        ValueError: one is missing.
    """
    if metric.real and sets["real"] is None:
        raise ValueError(f"{metric.key} compares with real images; give a reference")
    if metric.train and sets["training"] is None:
        raise ValueError(f"{metric.key} compares with the images trained on; give them with --train")
    required = {"generated": metric.generated, "real": metric.real, "training": metric.train}
    for side, roles in required.items():
        for role in roles:
            if role not in sets[side].roles:
                raise ValueError(f"{metric.key} needs {role!r} of the {side} images, got {sets[side].roles}")


def _check_sizes(
    metric: Metric,
    generated: FeatureSet,
    real: FeatureSet | None,
    train: FeatureSet | None,
    options: Mapping[str, object],
    allow_small: bool,
) -> list[str]:
    """Notes on sets that are too small, and on published statistics.

    Raises:
        TooFewImages: a set is too small, and `allow_small` is not set.
    """
    if metric.per_subject and "subjects" in generated.roles:
        return []  # DreamBooth's protocol says how many images there are
    width = generated[metric.generated[0]].shape[-1]
    minimum_real = metric.minimum_real or metric.minimum
    sizes = [("generated", generated.n, metric.minimum)]
    if metric.real and real.count(metric.real[0]) is not None:
        sizes.append(("real", real.count(metric.real[0]), minimum_real))
    if metric.train:
        sizes.append(("training", train.n, minimum_real))
    notes = []
    for side, n, minimum in sizes:
        note = check_size(metric.key, side, n, minimum(width, options), allow_small=allow_small)
        if note is not None:
            notes.append(note)
    for role in metric.real:
        if real.is_imported(role) and real.statistics_of(role).note:
            notes.append(real.statistics_of(role).note)
    return notes


def _cut_to_one_size(
    metric: Metric, generated: FeatureSet, real: FeatureSet, equalise: bool, seed: int
) -> tuple[FeatureSet, FeatureSet, list[str]]:
    """Both sets at one size where the metric's value depends on it, and a note on that."""
    if not metric.equal_n:
        return generated, real, []
    n, n_real, note = common_size(metric.key, generated.n, real.n, equalise=equalise)
    return generated.sample(n, seed), real.sample(n_real, seed), [note] if note else []
