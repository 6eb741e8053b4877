"""The metrics by name: what each reads, how many images it needs, how it is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from diffadapt.metrics import bindings, frechet
from diffadapt.metrics.bindings import MetricCall
from diffadapt.metrics.inception_score import (
    inception_score,
    inception_score_with_interval,
    is_gap,
    is_gap_with_interval,
)
from diffadapt.metrics.intervals import Estimate
from diffadapt.metrics.kernel import cmmd_with_interval, kid_subsets
from diffadapt.metrics.metric import Metric, Minimum
from diffadapt.metrics.msid import msid, msid_with_interval
from diffadapt.metrics.similarity import ceiling_similarity
from diffadapt.metrics.vendi import vendi, vendi_with_interval


def _single(estimate: Callable[[MetricCall], Estimate]) -> dict:
    """`value` and `estimate` of a metric whose interval costs nothing more than its value."""
    return {"value": lambda call: (estimate(call).value,), "estimate": lambda call: (estimate(call),)}


def _several(estimate: Callable[[MetricCall], tuple[Estimate, ...]]) -> dict:
    return {"value": lambda call: tuple(found.value for found in estimate(call)), "estimate": estimate}


_FEATURES = {"generated": ("features",), "real": ("features",)}
_ONE = ("features",)
_UNIT = ("unit",)
_UNITS = {"generated": _UNIT, "real": _UNIT}


def _twice_the_width(width: int, options: Mapping[str, object]) -> int:
    return 2 * width


def _at_least(n: int) -> Minimum:
    return lambda width, options: n


def _bias_of_both(n_generated: int, n_real: int) -> float:
    """The mean distance of two samples of one distribution goes with 1/n of both."""
    return 1 / n_generated + 1 / n_real


def _bias_of_reference(n_generated: int, n_real: int) -> float:
    """What stays of it when the generated images are extrapolated to infinitely many."""
    return 1 / n_real


def _frechet(key: str, role: str, *, extractor: str) -> Metric:
    """A Frechet distance of other features than those of `fid`; it takes a layer of its own."""
    name = f"{role}_statistics"
    return Metric(
        key,
        (key,),
        (role,),
        (name,),
        "lower",
        value=lambda call: (frechet.fid(**bindings.statistics(call, name)),),
        estimate=lambda call: (frechet.fid_with_interval(**bindings.statistics(call, name), seed=call.seed),),
        minimum=_twice_the_width,
        extractor=extractor,
        bias=_bias_of_both,
        is_extra=True,
    )


_ALL = (
    Metric(
        "fid",
        ("fid",),
        _ONE,
        ("statistics",),
        "lower",
        value=lambda call: (frechet.fid(**bindings.statistics(call)),),
        estimate=lambda call: (frechet.fid_with_interval(**bindings.statistics(call), seed=call.seed),),
        minimum=_twice_the_width,
        bias=_bias_of_both,
    ),
    _frechet("sfid", "spatial", extractor="inception"),
    _frechet("clip_fid", "raw", extractor="clip"),
    Metric(
        "fid_infinity",
        ("fid_infinity",),
        _ONE,
        ("statistics",),
        "lower",
        value=lambda call: (frechet.fid_infinity(**bindings.statistics(call), seed=call.seed),),
        estimate=lambda call: (
            frechet.fid_infinity_with_interval(**bindings.statistics(call), seed=call.seed),
        ),
        minimum=_twice_the_width,
        bias=_bias_of_reference,
    ),
    Metric(
        "kid",
        ("kid",),
        better="lower",
        minimum=_at_least(500),
        **_FEATURES,
        **_single(bindings.kid),
    ),
    Metric(
        "kid_subsets",
        ("kid_subsets",),
        better="lower",
        minimum=lambda width, options: options["size"],
        options={"subsets": 100, "size": 1000, "seed": 2020},
        **_FEATURES,
        value=lambda call: (kid_subsets(**bindings.pair(call)),),
        estimate=lambda call: (bindings.kid_subsets(call),),
    ),
    Metric(
        "cmmd",
        ("cmmd",),
        ("unit",),
        ("unit",),
        "lower",
        minimum=_at_least(500),
        extractor="clip",
        bias=_bias_of_both,
        **_single(lambda call: cmmd_with_interval(**bindings.units(call))),
    ),
    Metric(
        "inception_score",
        ("inception_score",),
        ("logits",),
        (),
        "higher",
        value=lambda call: (inception_score(**bindings.logits(call))[0],),
        estimate=lambda call: (inception_score_with_interval(**bindings.logits(call)),),
        minimum=lambda width, options: 500 * options["splits"],
        options={"splits": 10, "seed": 2020},
        floor="self",
    ),
    Metric(
        "is_gap",
        ("is_gap",),
        ("logits",),
        ("logits",),
        "lower",
        value=lambda call: (is_gap(**bindings.both_logits(call)),),
        estimate=lambda call: (is_gap_with_interval(**bindings.both_logits(call)),),
        minimum=lambda width, options: 500 * options["splits"],
        options={"splits": 10, "seed": 2020},
        equal_n=True,
        floor="sizes",
    ),
    Metric(
        "precision_recall",
        ("precision", "recall"),
        better="higher",
        minimum=_at_least(1000),
        options={"k": 3},
        equal_n=True,
        floor="sizes",
        version="1, ties count",
        **_FEATURES,
        **_several(bindings.precision_recall),
    ),
    Metric(
        "density_coverage",
        ("density", "coverage"),
        better="higher",
        minimum=_at_least(1000),
        options={"k": 5},
        equal_n=True,
        floor="sizes",
        version="1, ties do not count",
        **_FEATURES,
        **_several(bindings.density_coverage),
    ),
    Metric(
        "msid",
        ("msid",),
        better="lower",
        value=lambda call: (msid(**bindings.pair(call), seed=call.seed),),
        estimate=lambda call: (msid_with_interval(**bindings.pair(call), seed=call.seed),),
        minimum=_at_least(2000),
        options={"k": 5},
        equal_n=True,
        floor="sizes",
        **_FEATURES,
    ),
    Metric(
        "vendi",
        ("vendi",),
        _UNIT,
        (),
        "higher",
        value=lambda call: (vendi(features=call.generated["unit"]),),
        estimate=lambda call: (vendi_with_interval(features=call.generated["unit"], seed=call.seed),),
        minimum=_at_least(100),
        floor="self",
    ),
    Metric(
        "clip_t",
        ("clip_t",),
        ("unit", "texts"),
        (),
        "higher",
        minimum=_at_least(10),
        extractor="clip",
        floor="self_any",
        **_single(bindings.text_similarity),
    ),
    *(
        Metric(
            key,
            (key,),
            better="higher",
            minimum=_at_least(4),
            minimum_real=_at_least(2),
            extractor=extractor,
            floor=lambda real: (ceiling_similarity(real=real["unit"]),),
            per_image=bindings.image_similarities,
            **_UNITS,
            **_single(bindings.image_similarity),
        )
        for key, extractor in (("clip_i", "clip"), ("dino", "dino"))
    ),
    Metric(
        "copy_rate",
        ("copy_rate",),
        better="lower",
        minimum=_at_least(10),
        minimum_real=_at_least(2),
        options={"threshold": None},
        extractor="dino",
        floor="",
        **_UNITS,
        **_single(bindings.copies),
    ),
    Metric(
        "lpips_diversity",
        ("lpips_diversity",),
        ("pixels", "groups"),
        (),
        "higher",
        minimum=_at_least(4),
        extractor="lpips",
        floor="self_any",
        **_single(bindings.lpips_diversity),
    ),
    Metric(
        "authpct",
        ("authpct",),
        _ONE,
        (),
        "higher",
        minimum=_at_least(100),
        minimum_real=_at_least(2),
        train=_ONE,
        floor="self_any",
        **_single(bindings.authpct),
    ),
    Metric(
        "fls",
        ("fls",),
        better="higher",
        minimum=_at_least(1000),
        train=_ONE,
        floor=lambda real: (100.0,),  # by definition: as other training images do
        is_extra=True,
        **_FEATURES,
        **_single(bindings.fls),
    ),
    Metric(
        "preference",
        ("preference",),
        ("preference",),
        (),
        "higher",
        minimum=_at_least(10),
        extractor="preference",
        floor="",
        **_single(bindings.preference),
    ),
)

METRICS: dict[str, Metric] = {metric.key: metric for metric in _ALL}
