"""The metrics by name: what each reads, how many images it needs, how it is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from diffadapt.metrics import copying, diversity, frechet, inception_score, kernel, manifold, msid, vendi
from diffadapt.metrics import similarity as cosines
from diffadapt.metrics.intervals import (
    Estimate,
    cluster_means,
    clustered_interval,
    mean_interval,
    proportion_interval,
)
from diffadapt.metrics.metric import Job, Metric, Minimum


def _pair(job: Job) -> dict:
    return {"real": job.real["features"], "generated": job.generated["features"], **job.options}


def _statistics(job: Job) -> dict:
    return {"real": job.real.statistics, "generated": job.generated.statistics}


def _logits(job: Job) -> dict:
    return {"logits": job.generated["logits"], **job.options}


def _both_logits(job: Job) -> dict:
    return {"real_logits": job.real["logits"], "generated_logits": job.generated["logits"], **job.options}


def _kid_subsets(job: Job) -> Estimate:
    """No interval: the subsets share images, so their spread says nothing of the error; `kid` has one."""
    return Estimate(kernel.kid_subsets(**_pair(job)))


def _precision_recall(job: Job) -> tuple[Estimate, ...]:
    k = job.options["k"]
    known = {"real_neighbours": job.real.neighbours(k), "generated_neighbours": job.generated.neighbours(k)}
    found = manifold.precision_recall_with_interval(**_pair(job), **known)
    return found["precision"], found["recall"]


def _density_coverage(job: Job) -> tuple[Estimate, ...]:
    known = job.real.neighbours(job.options["k"])
    found = manifold.density_coverage_with_interval(**_pair(job), real_neighbours=known)
    return found["density"], found["coverage"]


def _image_similarity(job: Job) -> Estimate:
    return _mean(job, cosines.image_similarities(**_pair(job)))


def _text_similarity(job: Job) -> Estimate:
    return _mean(
        job, cosines.text_similarities(images=job.generated["features"], texts=job.generated["texts"])
    )


def _mean(job: Job, values: Tensor) -> Estimate:
    """A mean over images; over prompts or subjects where the set says which image belongs to which."""
    groups = job.generated.features.get("groups")
    if groups is not None and len(groups.unique()) > 1:
        means = list(cluster_means(values, groups).values())
        interval = clustered_interval(values, groups, over="groups of images", seed=job.seed)
        return Estimate(sum(means) / len(means), interval)
    return Estimate(float(values.mean()), mean_interval(values))


def _copies(job: Job) -> Estimate:
    mirrored = job.real.features.get("mirrored")
    hits = copying.copies(
        generated=job.generated["features"], training=job.real["features"], mirrored=mirrored, **job.options
    )
    count = int(hits.sum())
    return Estimate(count / len(hits), proportion_interval(count, len(hits), given="the training images"))


def _diversity(job: Job) -> Estimate:
    if job.network is None:
        raise ValueError(
            "lpips_diversity needs the weights of an LPIPS backbone; see diffadapt.metrics.diversity"
        )
    return diversity.lpips_diversity_with_interval(
        pixels=job.generated["pixels"], groups=job.generated["groups"], network=job.network, seed=job.seed
    )


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
        value=lambda job: (frechet.fid(**_statistics(job)),),
        estimate=lambda job: (frechet.fid_with_interval(**_statistics(job), seed=job.seed),),
        minimum=_twice_the_width,
    ),
    Metric(
        "fid_infinity",
        ("fid_infinity",),
        _ONE,
        ("statistics",),
        "lower",
        value=lambda job: (frechet.fid_infinity(**_statistics(job), seed=job.seed),),
        estimate=lambda job: (frechet.fid_infinity_with_interval(**_statistics(job), seed=job.seed),),
        minimum=_twice_the_width,
    ),
    Metric(
        "kid",
        ("kid",),
        better="lower",
        minimum=_at_least(500),
        **_FEATURES,
        **_single(lambda job: kernel.kid_with_interval(**_pair(job))),
    ),
    Metric(
        "kid_subsets",
        ("kid_subsets",),
        better="lower",
        minimum=lambda width, options: options["size"],
        options={"subsets": 100, "size": 1000, "seed": 2020},
        **_FEATURES,
        **_single(_kid_subsets),
    ),
    Metric(
        "inception_score",
        ("inception_score",),
        ("logits",),
        (),
        "higher",
        value=lambda job: (inception_score.inception_score(**_logits(job))[0],),
        estimate=lambda job: (inception_score.inception_score_with_interval(**_logits(job)),),
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
        value=lambda job: (inception_score.is_gap(**_both_logits(job)),),
        estimate=lambda job: (inception_score.is_gap_with_interval(**_both_logits(job)),),
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
        **_FEATURES,
        **_several(_precision_recall),
    ),
    Metric(
        "density_coverage",
        ("density", "coverage"),
        better="higher",
        minimum=_at_least(1000),
        options={"k": 5},
        equal_n=True,
        **_FEATURES,
        **_several(_density_coverage),
    ),
    Metric(
        "msid",
        ("msid",),
        better="lower",
        value=lambda job: (msid.msid(**_pair(job), seed=job.seed),),
        estimate=lambda job: (msid.msid_with_interval(**_pair(job), seed=job.seed),),
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
        value=lambda job: (vendi.vendi(features=job.generated["features"]),),
        estimate=lambda job: (vendi.vendi_with_interval(features=job.generated["features"], seed=job.seed),),
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
        **_single(_text_similarity),
    ),
    *(
        Metric(
            key,
            (key,),
            better="higher",
            minimum=_at_least(4),
            minimum_real=_at_least(2),
            extractor=extractor,
            floor=lambda real: (cosines.ceiling_similarity(real=real["features"]),),
            **_FEATURES,
            **_single(_image_similarity),
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
        **_single(_copies),
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
        **_single(_diversity),
    ),
)

METRICS: dict[str, Metric] = {metric.key: metric for metric in _ALL}
