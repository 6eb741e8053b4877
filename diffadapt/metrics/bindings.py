"""From the sets of one computation to each metric's function.

The functions of metrics take tensors and know nothing of sets. For each of them a short function here says
which features of which set it reads, and passes on what a set has already computed (statistics, neighbours).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.metrics import (
    authenticity,
    copying,
    diversity,
    frechet,
    kernel,
    likelihood,
    manifold,
    similarity,
)
from diffadapt.metrics.feature_set import FeatureSet
from diffadapt.metrics.inception_score import (
    inception_score,
    inception_score_with_interval,
    is_gap,
    is_gap_with_interval,
)
from diffadapt.metrics.intervals import (
    Estimate,
    cluster_means,
    clustered_interval,
    mean_interval,
    proportion_interval,
)
from diffadapt.metrics.msid import msid, msid_with_interval
from diffadapt.metrics.vendi import vendi, vendi_with_interval


@dataclass(frozen=True)
class MetricCall:
    """One computation of one metric.

    Attributes:
        generated: the set to score.
        real: the reference; None for a metric that reads none.
        options: all options of the metric.
        seed: of subsets, bootstraps and probes.
        network: distance of two images, for LPIPS.
        train: the generator's training images.
    """

    generated: FeatureSet
    real: FeatureSet | None
    options: Mapping[str, object]
    seed: int = 0
    network: diversity.Distance | None = None
    train: FeatureSet | None = None


# Distances between two distributions of features


def frechet_distance_value(call: MetricCall, *, statistics: str = "statistics") -> float:
    """Frechet distance of the sets' statistics in one of `feature_set.STATISTICS`."""
    return frechet.fid(**_statistics(call, statistics))


def frechet_distance_estimate(call: MetricCall, *, statistics: str = "statistics") -> Estimate:
    return frechet.fid_with_interval(**_statistics(call, statistics), seed=call.seed)


def fid_infinity_value(call: MetricCall) -> float:
    return frechet.fid_infinity(**_statistics(call), seed=call.seed)


def fid_infinity_estimate(call: MetricCall) -> Estimate:
    return frechet.fid_infinity_with_interval(**_statistics(call), seed=call.seed)


def kid_estimate(call: MetricCall) -> Estimate:
    return kernel.kid_with_interval(**_features(call), mmd=call.real.discrepancy(call.generated))


def kid_subsets_value(call: MetricCall) -> float:
    return kernel.kid_subsets(**_features(call), **call.options)


def kid_subsets_estimate(call: MetricCall) -> Estimate:
    discrepancy = call.real.discrepancy(call.generated)
    return kernel.kid_subsets_with_interval(**_features(call), **call.options, mmd=discrepancy)


def cmmd_estimate(call: MetricCall) -> Estimate:
    return kernel.cmmd_with_interval(**_unit_features(call))


def msid_value(call: MetricCall) -> float:
    return msid(**_features(call), **call.options, seed=call.seed)


def msid_estimate(call: MetricCall) -> Estimate:
    return msid_with_interval(**_features(call), **call.options, seed=call.seed)


# Scores of a classifier's logits


def inception_score_value(call: MetricCall) -> float:
    mean, _ = inception_score(logits=call.generated["logits"], **call.options)
    return mean


def inception_score_estimate(call: MetricCall) -> Estimate:
    return inception_score_with_interval(logits=call.generated["logits"], **call.options)


def is_gap_value(call: MetricCall) -> float:
    return is_gap(**_logits(call), **call.options)


def is_gap_estimate(call: MetricCall) -> Estimate:
    return is_gap_with_interval(**_logits(call), **call.options)


# Nearest neighbours


def precision_recall_estimates(call: MetricCall) -> tuple[Estimate, Estimate]:
    k = call.options["k"]
    estimates = manifold.precision_recall_with_interval(
        **_features(call),
        k=k,
        real_neighbours=call.real.neighbours(k),
        generated_neighbours=call.generated.neighbours(k),
    )
    return estimates["precision"], estimates["recall"]


def density_coverage_estimates(call: MetricCall) -> tuple[Estimate, Estimate]:
    k = call.options["k"]
    estimates = manifold.density_coverage_with_interval(
        **_features(call), k=k, real_neighbours=call.real.neighbours(k)
    )
    return estimates["density"], estimates["coverage"]


def authpct_estimate(call: MetricCall) -> Estimate:
    return authenticity.authpct_with_interval(
        training=call.train["features"], generated=call.generated["features"]
    )


def fls_estimate(call: MetricCall) -> Estimate:
    return likelihood.fls_with_interval(
        training=call.train["features"],
        test=call.real["features"],
        generated=call.generated["features"],
        seed=call.seed,
    )


def copy_rate_estimate(call: MetricCall) -> Estimate:
    """Share of copies, each judged by the threshold of its subject's real images."""
    is_copy = _by_subject(call, lambda generated, real: _copies(generated, real, call.options))
    count = int(is_copy.sum())
    condition = "the training images"
    if "subjects" in call.generated.roles:
        condition = "the real images, generated ones as independent"
    return Estimate(count / len(is_copy), proportion_interval(count, len(is_copy), condition=condition))


def _copies(generated: FeatureSet, real: FeatureSet, options: Mapping[str, object]) -> Tensor:
    mirrored = real.features.get("mirrored")
    return copying.copies(training=real["unit"], generated=generated["unit"], mirrored=mirrored, **options)


# Diversity of the generated images alone


def vendi_value(call: MetricCall) -> float:
    return vendi(features=call.generated["unit"])


def vendi_estimate(call: MetricCall) -> Estimate:
    return vendi_with_interval(features=call.generated["unit"], seed=call.seed)


def lpips_diversity_estimate(call: MetricCall) -> Estimate:
    if call.network is None:
        raise ValueError(
            "lpips_diversity needs the weights of an LPIPS backbone; see diffadapt.metrics.diversity"
        )
    images = {
        "pixels": call.generated["pixels"],
        "groups": call.generated["groups"],
        "network": call.network,
    }
    if "subjects" in call.generated.roles:
        return _mean_over_subjects(call, diversity.group_distances(**images))
    return diversity.lpips_diversity_with_interval(**images, seed=call.seed)


# Means of one number per generated image


def image_similarities(call: MetricCall) -> Tensor:
    """Mean cosine of each generated image to the real images, those of its subject where it has one, (M,)."""
    return _by_subject(
        call,
        lambda generated, real: similarity.image_similarities(real=real["unit"], generated=generated["unit"]),
    )


def image_similarity_value(call: MetricCall) -> float:
    return _mean_over_images(call, image_similarities(call))


def image_similarity_estimate(call: MetricCall) -> Estimate:
    return _mean_estimate(call, image_similarities(call), low=-1, high=1)


def image_similarity_ceiling(real: FeatureSet) -> float | None:
    """Mean cosine of different real images of a subject; None where no subject has two.

    Without subjects, all images are of one.
    """
    if "subjects" not in real.roles:
        return similarity.ceiling_similarity(real=real["unit"])
    ceilings = []  # of every subject with at least one pair
    for rows in real.rows_by_subject().values():
        if len(rows) > 1:
            ceilings.append(similarity.ceiling_similarity(real=real["unit"][rows]))
    return sum(ceilings) / len(ceilings) if ceilings else None


def text_similarities(call: MetricCall) -> Tensor:
    """Cosine of each generated image to its text, (M,)."""
    return similarity.text_similarities(images=call.generated["unit"], texts=call.generated["texts"])


def text_similarity_value(call: MetricCall) -> float:
    return _mean_over_images(call, text_similarities(call))


def text_similarity_estimate(call: MetricCall) -> Estimate:
    return _mean_estimate(call, text_similarities(call), low=-1, high=1)


def preference_estimate(call: MetricCall) -> Estimate:
    """The mean of the numbers that a model of preference gave."""
    return _mean_estimate(call, call.generated["preference"][:, 0])


def _mean_over_images(call: MetricCall, values: Tensor) -> float:
    """The mean of `values` (M,), one per generated image; of prompt means where prompts are known."""
    groups = call.generated.features.get("groups")
    if groups is None:
        return float(values.mean())
    prompt_means = cluster_means(values, groups)
    if "subjects" in call.generated.roles:
        return _mean_over_subjects(call, prompt_means).value
    if len(prompt_means) == 1:
        return float(values.mean())
    return sum(prompt_means.values()) / len(prompt_means)


def _mean_estimate(
    call: MetricCall, values: Tensor, *, low: float = -math.inf, high: float = math.inf
) -> Estimate:
    """`_mean_over_images` with an interval over images, prompts or subjects, cut to `low` and `high`.

    The interval over subjects is not cut.
    """
    groups = call.generated.features.get("groups")
    if "subjects" in call.generated.roles:
        return _mean_over_subjects(call, cluster_means(values, groups))
    value = _mean_over_images(call, values)
    if groups is None or len(groups.unique()) == 1:
        return Estimate(value, mean_interval(values, low=low, high=high))
    over = "groups of images"
    return Estimate(value, clustered_interval(values, groups, over=over, seed=call.seed, low=low, high=high))


def _mean_over_subjects(call: MetricCall, prompt_means: Mapping[int, float]) -> Estimate:
    """The mean over prompts, then over subjects; DreamBooth's protocol (arXiv 2208.12242, section 4.1).

    The interval is over subjects, as images of one subject are not independent; of a single subject it is
    over its prompts, and there is none for a single prompt.

    Args:
        prompt_means: mean of the images of each prompt of each subject, by the numbers of role "groups".
    """
    prompts = call.generated["groups"].tolist()
    subjects = call.generated["subjects"].tolist()
    subject_of_prompt = dict(zip(prompts, subjects, strict=True))
    means = torch.tensor(list(prompt_means.values()), dtype=torch.float64)  # (prompts of all subjects,)
    clusters = [subject_of_prompt[prompt] for prompt in prompt_means]
    subject_means = cluster_means(means, clusters)
    interval = None
    if len(subject_means) > 1:
        interval = clustered_interval(means, clusters, over="subjects", seed=call.seed)
    elif len(means) > 1:
        interval = mean_interval(means, over="prompts")
    return Estimate(sum(subject_means.values()) / len(subject_means), interval)


# What several metrics read


def _features(call: MetricCall) -> dict[str, Tensor]:
    return {"real": call.real["features"], "generated": call.generated["features"]}


def _unit_features(call: MetricCall) -> dict[str, Tensor]:
    return {"real": call.real["unit"], "generated": call.generated["unit"]}


def _logits(call: MetricCall) -> dict[str, Tensor]:
    return {"real_logits": call.real["logits"], "generated_logits": call.generated["logits"]}


def _statistics(call: MetricCall, name: str = "statistics") -> dict[str, frechet.Statistics]:
    return {"real": call.real.statistics_of(name), "generated": call.generated.statistics_of(name)}


def _by_subject(call: MetricCall, compute: Callable[[FeatureSet, FeatureSet], Tensor]) -> Tensor:
    """`compute(generated, real)` of each subject's images alone; of both sets as they are without subjects.

    Returns:
        One value per generated image, (M,).

    Raises:
        ValueError: a subject cannot be scored; names it.
    """
    generated = call.generated
    real = call.real
    if "subjects" not in generated.roles:
        return compute(generated, real)
    real_rows = real.rows_by_subject()
    order = []
    parts = []
    for subject, rows in generated.rows_by_subject().items():
        try:
            parts.append(compute(generated.rows(rows), real.rows(real_rows[subject])))
        except ValueError as error:
            raise ValueError(f"subject {real.subject_names[subject]!r}: {error}") from None
        order.append(rows)
    values = torch.cat(parts)  # subject by subject
    return values[torch.cat(order).argsort()]  # in the order of the generated images
