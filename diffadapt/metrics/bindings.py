"""How each metric reads its sets: from the inputs of one computation to the metric's function."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from diffadapt.metrics import authenticity, copying, diversity, kernel, likelihood, manifold, similarity
from diffadapt.metrics.feature_set import FeatureSet
from diffadapt.metrics.intervals import (
    Estimate,
    cluster_means,
    clustered_interval,
    mean_interval,
    proportion_interval,
)


@dataclass(frozen=True)
class MetricCall:
    """One computation of one metric."""

    generated: FeatureSet
    real: FeatureSet | None
    options: Mapping[str, object]
    seed: int = 0
    network: diversity.Distance | None = None
    train: FeatureSet | None = None


def pair(call: MetricCall) -> dict:
    return {"real": call.real["features"], "generated": call.generated["features"], **call.options}


def statistics(call: MetricCall, name: str = "statistics") -> dict:
    return {"real": call.real.statistics_of(name), "generated": call.generated.statistics_of(name)}


def units(call: MetricCall) -> dict:
    """Features of length 1 of both sets."""
    return {"real": call.real["unit"], "generated": call.generated["unit"]}


def logits(call: MetricCall) -> dict:
    return {"logits": call.generated["logits"], **call.options}


def both_logits(call: MetricCall) -> dict:
    return {"real_logits": call.real["logits"], "generated_logits": call.generated["logits"], **call.options}


def kid(call: MetricCall) -> Estimate:
    return kernel.kid_with_interval(**pair(call), known=call.real.discrepancy(call.generated))


def kid_subsets(call: MetricCall) -> Estimate:
    return kernel.kid_subsets_with_interval(**pair(call), known=call.real.discrepancy(call.generated))


def precision_recall(call: MetricCall) -> tuple[Estimate, ...]:
    k = call.options["k"]
    known = {"real_neighbours": call.real.neighbours(k), "generated_neighbours": call.generated.neighbours(k)}
    found = manifold.precision_recall_with_interval(**pair(call), **known)
    return found["precision"], found["recall"]


def density_coverage(call: MetricCall) -> tuple[Estimate, ...]:
    known = call.real.neighbours(call.options["k"])
    found = manifold.density_coverage_with_interval(**pair(call), real_neighbours=known)
    return found["density"], found["coverage"]


def image_similarities(call: MetricCall) -> Tensor:
    return similarity.image_similarities(**units(call))


def image_similarity(call: MetricCall) -> Estimate:
    return _mean(call, image_similarities(call), low=-1, high=1)


def text_similarity(call: MetricCall) -> Estimate:
    values = similarity.text_similarities(images=call.generated["unit"], texts=call.generated["texts"])
    return _mean(call, values, low=-1, high=1)


def _mean(call: MetricCall, values: Tensor, *, low: float = -math.inf, high: float = math.inf) -> Estimate:
    """A mean over images; over prompts or subjects where the set says which image belongs to which."""
    groups = call.generated.features.get("groups")
    if groups is not None and len(groups.unique()) > 1:
        means = list(cluster_means(values, groups).values())
        interval = clustered_interval(
            values, groups, over="groups of images", seed=call.seed, low=low, high=high
        )
        return Estimate(sum(means) / len(means), interval)
    return Estimate(float(values.mean()), mean_interval(values, low=low, high=high))


def copies(call: MetricCall) -> Estimate:
    mirrored = call.real.features.get("mirrored")
    hits = copying.copies(
        generated=call.generated["unit"], training=call.real["unit"], mirrored=mirrored, **call.options
    )
    count = int(hits.sum())
    return Estimate(count / len(hits), proportion_interval(count, len(hits), given="the training images"))


def authpct(call: MetricCall) -> Estimate:
    return authenticity.authpct_with_interval(
        training=call.train["features"], generated=call.generated["features"]
    )


def fls(call: MetricCall) -> Estimate:
    return likelihood.fls_with_interval(
        training=call.train["features"],
        test=call.real["features"],
        generated=call.generated["features"],
        seed=call.seed,
    )


def preference(call: MetricCall) -> Estimate:
    """The mean of one number per image, which a plug-in gave."""
    return _mean(call, call.generated["preference"][:, 0])


def lpips_diversity(call: MetricCall) -> Estimate:
    if call.network is None:
        raise ValueError(
            "lpips_diversity needs the weights of an LPIPS backbone; see diffadapt.metrics.diversity"
        )
    return diversity.lpips_diversity_with_interval(
        pixels=call.generated["pixels"], groups=call.generated["groups"], network=call.network, seed=call.seed
    )
