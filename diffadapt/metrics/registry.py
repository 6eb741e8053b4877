"""The metrics by name: what each reads, how many images it needs, how it is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from diffadapt.metrics import frechet, jobs
from diffadapt.metrics.inception_score import (
    inception_score,
    inception_score_with_interval,
    is_gap,
    is_gap_with_interval,
)
from diffadapt.metrics.intervals import Estimate
from diffadapt.metrics.jobs import Job
from diffadapt.metrics.kernel import kid_subsets
from diffadapt.metrics.metric import Metric, Minimum
from diffadapt.metrics.msid import msid, msid_with_interval
from diffadapt.metrics.similarity import ceiling_similarity
from diffadapt.metrics.vendi import vendi, vendi_with_interval


def _single(estimate: Callable[[Job], Estimate]) -> dict:
    """`value` and `estimate` of a metric whose interval costs nothing more than its value."""
    return {"value": lambda job: (estimate(job).value,), "estimate": lambda job: (estimate(job),)}


def _several(estimate: Callable[[Job], tuple[Estimate, ...]]) -> dict:
    return {"value": lambda job: tuple(found.value for found in estimate(job)), "estimate": estimate}


_FEATURES = {"generated": ("features",), "real": ("features",)}
_ONE = ("features",)


def _twice_the_width(width: int, options: Mapping[str, object]) -> int:
    return 2 * width


def _at_least(n: int) -> Minimum:
    return lambda width, options: n


_ALL = (
    Metric(
        "fid",
        ("fid",),
        _ONE,
        ("statistics",),
        "lower",
        value=lambda job: (frechet.fid(**jobs.statistics(job)),),
        estimate=lambda job: (frechet.fid_with_interval(**jobs.statistics(job), seed=job.seed),),
        minimum=_twice_the_width,
    ),
    Metric(
        "fid_infinity",
        ("fid_infinity",),
        _ONE,
        ("statistics",),
        "lower",
        value=lambda job: (frechet.fid_infinity(**jobs.statistics(job), seed=job.seed),),
        estimate=lambda job: (frechet.fid_infinity_with_interval(**jobs.statistics(job), seed=job.seed),),
        minimum=_twice_the_width,
    ),
    Metric(
        "kid",
        ("kid",),
        better="lower",
        minimum=_at_least(500),
        **_FEATURES,
        **_single(jobs.kid),
    ),
    Metric(
        "kid_subsets",
        ("kid_subsets",),
        better="lower",
        minimum=lambda width, options: options["size"],
        options={"subsets": 100, "size": 1000, "seed": 2020},
        **_FEATURES,
        value=lambda job: (kid_subsets(**jobs.pair(job)),),
        estimate=lambda job: (jobs.kid_subsets(job),),
    ),
    Metric(
        "inception_score",
        ("inception_score",),
        ("logits",),
        (),
        "higher",
        value=lambda job: (inception_score(**jobs.logits(job))[0],),
        estimate=lambda job: (inception_score_with_interval(**jobs.logits(job)),),
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
        value=lambda job: (is_gap(**jobs.both_logits(job)),),
        estimate=lambda job: (is_gap_with_interval(**jobs.both_logits(job)),),
        minimum=lambda width, options: 500 * options["splits"],
        options={"splits": 10, "seed": 2020},
        equal_n=True,
    ),
    Metric(
        "precision_recall",
        ("precision", "recall"),
        better="higher",
        minimum=_at_least(1000),
        options={"k": 3},
        equal_n=True,
        version="1, ties count",
        **_FEATURES,
        **_several(jobs.precision_recall),
    ),
    Metric(
        "density_coverage",
        ("density", "coverage"),
        better="higher",
        minimum=_at_least(1000),
        options={"k": 5},
        equal_n=True,
        version="1, ties do not count",
        **_FEATURES,
        **_several(jobs.density_coverage),
    ),
    Metric(
        "msid",
        ("msid",),
        better="lower",
        value=lambda job: (msid(**jobs.pair(job), seed=job.seed),),
        estimate=lambda job: (msid_with_interval(**jobs.pair(job), seed=job.seed),),
        minimum=_at_least(2000),
        options={"k": 5},
        equal_n=True,
        **_FEATURES,
    ),
    Metric(
        "vendi",
        ("vendi",),
        _ONE,
        (),
        "higher",
        value=lambda job: (vendi(features=job.generated["features"]),),
        estimate=lambda job: (vendi_with_interval(features=job.generated["features"], seed=job.seed),),
        minimum=_at_least(100),
        floor="self",
    ),
    Metric(
        "clip_t",
        ("clip_t",),
        ("features", "texts"),
        (),
        "higher",
        minimum=_at_least(10),
        extractor="clip",
        floor="self",
        **_single(jobs.text_similarity),
    ),
    *(
        Metric(
            key,
            (key,),
            better="higher",
            minimum=_at_least(4),
            minimum_real=_at_least(2),
            extractor=extractor,
            floor=lambda real: (ceiling_similarity(real=real["features"]),),
            **_FEATURES,
            **_single(jobs.image_similarity),
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
        **_FEATURES,
        **_single(jobs.copies),
    ),
    Metric(
        "lpips_diversity",
        ("lpips_diversity",),
        ("pixels", "groups"),
        (),
        "higher",
        minimum=_at_least(4),
        extractor="lpips",
        floor="self",
        **_single(jobs.lpips_diversity),
    ),
)

METRICS: dict[str, Metric] = {metric.key: metric for metric in _ALL}
