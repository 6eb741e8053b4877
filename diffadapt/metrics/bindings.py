"""How each metric reads its sets: from the inputs of one computation to the metric's function."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from diffadapt.metrics import authenticity, copying, diversity, kernel, likelihood, manifold, similarity
from diffadapt.metrics.feature_set import Inputs
from diffadapt.metrics.intervals import (
    Estimate,
    cluster_means,
    clustered_interval,
    mean_interval,
    proportion_interval,
)


@dataclass(frozen=True)
class Job:
    """One computation of one metric."""

    generated: Inputs
    real: Inputs | None
    options: Mapping[str, object]
    seed: int = 0
    network: diversity.Distance | None = None
    train: Inputs | None = None


def pair(job: Job) -> dict:
    return {"real": job.real["features"], "generated": job.generated["features"], **job.options}


def statistics(job: Job, name: str = "statistics") -> dict:
    return {"real": job.real.statistics_of(name), "generated": job.generated.statistics_of(name)}


def units(job: Job) -> dict:
    """Features of length 1 of both sets."""
    return {"real": job.real["unit"], "generated": job.generated["unit"]}


def logits(job: Job) -> dict:
    return {"logits": job.generated["logits"], **job.options}


def both_logits(job: Job) -> dict:
    return {"real_logits": job.real["logits"], "generated_logits": job.generated["logits"], **job.options}


def kid(job: Job) -> Estimate:
    return kernel.kid_with_interval(**pair(job), known=job.real.discrepancy(job.generated))


def kid_subsets(job: Job) -> Estimate:
    return kernel.kid_subsets_with_interval(**pair(job), known=job.real.discrepancy(job.generated))


def precision_recall(job: Job) -> tuple[Estimate, ...]:
    k = job.options["k"]
    known = {"real_neighbours": job.real.neighbours(k), "generated_neighbours": job.generated.neighbours(k)}
    found = manifold.precision_recall_with_interval(**pair(job), **known)
    return found["precision"], found["recall"]


def density_coverage(job: Job) -> tuple[Estimate, ...]:
    known = job.real.neighbours(job.options["k"])
    found = manifold.density_coverage_with_interval(**pair(job), real_neighbours=known)
    return found["density"], found["coverage"]


def image_similarities(job: Job) -> Tensor:
    return similarity.image_similarities(**units(job))


def image_similarity(job: Job) -> Estimate:
    return _mean(job, image_similarities(job), low=-1, high=1)


def text_similarity(job: Job) -> Estimate:
    values = similarity.text_similarities(images=job.generated["unit"], texts=job.generated["texts"])
    return _mean(job, values, low=-1, high=1)


def _mean(job: Job, values: Tensor, *, low: float = -math.inf, high: float = math.inf) -> Estimate:
    """A mean over images; over prompts or subjects where the set says which image belongs to which."""
    groups = job.generated.features.get("groups")
    if groups is not None and len(groups.unique()) > 1:
        means = list(cluster_means(values, groups).values())
        interval = clustered_interval(
            values, groups, over="groups of images", seed=job.seed, low=low, high=high
        )
        return Estimate(sum(means) / len(means), interval)
    return Estimate(float(values.mean()), mean_interval(values, low=low, high=high))


def copies(job: Job) -> Estimate:
    mirrored = job.real.features.get("mirrored")
    hits = copying.copies(
        generated=job.generated["unit"], training=job.real["unit"], mirrored=mirrored, **job.options
    )
    count = int(hits.sum())
    return Estimate(count / len(hits), proportion_interval(count, len(hits), given="the training images"))


def authpct(job: Job) -> Estimate:
    return authenticity.authpct_with_interval(
        training=job.train["features"], generated=job.generated["features"]
    )


def fls(job: Job) -> Estimate:
    return likelihood.fls_with_interval(
        training=job.train["features"],
        test=job.real["features"],
        generated=job.generated["features"],
        seed=job.seed,
    )


def preference(job: Job) -> Estimate:
    """The mean of one number per image, which a plug-in gave."""
    return _mean(job, job.generated["preference"][:, 0])


def lpips_diversity(job: Job) -> Estimate:
    if job.network is None:
        raise ValueError(
            "lpips_diversity needs the weights of an LPIPS backbone; see diffadapt.metrics.diversity"
        )
    return diversity.lpips_diversity_with_interval(
        pixels=job.generated["pixels"], groups=job.generated["groups"], network=job.network, seed=job.seed
    )
