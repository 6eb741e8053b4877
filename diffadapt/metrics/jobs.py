"""How each metric reads its sets: from the inputs of one computation to the metric's function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from diffadapt.metrics import copying, diversity, kernel, manifold, similarity
from diffadapt.metrics.inputs import Inputs
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


def pair(job: Job) -> dict:
    return {"real": job.real["features"], "generated": job.generated["features"], **job.options}


def statistics(job: Job) -> dict:
    return {"real": job.real.statistics, "generated": job.generated.statistics}


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


def image_similarity(job: Job) -> Estimate:
    return _mean(job, similarity.image_similarities(**pair(job)))


def text_similarity(job: Job) -> Estimate:
    return _mean(
        job, similarity.text_similarities(images=job.generated["features"], texts=job.generated["texts"])
    )


def _mean(job: Job, values: Tensor) -> Estimate:
    """A mean over images; over prompts or subjects where the set says which image belongs to which."""
    groups = job.generated.features.get("groups")
    if groups is not None and len(groups.unique()) > 1:
        means = list(cluster_means(values, groups).values())
        interval = clustered_interval(values, groups, over="groups of images", seed=job.seed, low=-1, high=1)
        return Estimate(sum(means) / len(means), interval)
    return Estimate(float(values.mean()), mean_interval(values, low=-1, high=1))


def copies(job: Job) -> Estimate:
    mirrored = job.real.features.get("mirrored")
    hits = copying.copies(
        generated=job.generated["features"], training=job.real["features"], mirrored=mirrored, **job.options
    )
    count = int(hits.sum())
    return Estimate(count / len(hits), proportion_interval(count, len(hits), given="the training images"))


def lpips_diversity(job: Job) -> Estimate:
    if job.network is None:
        raise ValueError(
            "lpips_diversity needs the weights of an LPIPS backbone; see diffadapt.metrics.diversity"
        )
    return diversity.lpips_diversity_with_interval(
        pixels=job.generated["pixels"], groups=job.generated["groups"], network=job.network, seed=job.seed
    )
