"""Numbers of images against what metrics need, checked before any image goes through a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from diffadapt.evaluation.features.extractors import Extractor
from diffadapt.evaluation.scoring import Plan, plan_for, suits
from diffadapt.metrics.metric import Metric
from diffadapt.metrics.registry import METRICS
from diffadapt.metrics.sample_size import TooFewImages, check_size


def check_sizes(
    plan: Plan, extractors: Sequence[Extractor], generated: Mapping[str, int], n_real: int | None
) -> None:
    """Checks that the sets are large enough for what is to be computed.

    Args:
        plan: the metrics and their options.
        extractors: all extractors of the evaluation.
        generated: label -> number of images.
        n_real: images of the reference; None where there is none, or only its statistics are known.

    Raises:
        ValueError: a set is too small for a metric that was asked for by name, all of which are listed; or,
            when no metric was named, a set is too small for every metric.
    """
    problems: list[str] = []
    for label, n_generated in generated.items():
        if plan.metrics:
            problems += _named_metric_problems(plan, extractors, label, n_generated, n_real)
        else:
            problems += _all_metrics_problems(plan, extractors, label, n_generated, n_real)
    if problems:
        unique_problems = dict.fromkeys(problems)  # several extractors may lack the same images
        lines = "\n".join(f"  {line}" for line in unique_problems)
        raise ValueError(f"too few images; nothing was computed:\n{lines}")


def _named_metric_problems(
    plan: Plan, extractors: Sequence[Extractor], label: str, n_generated: int, n_real: int | None
) -> list[str]:
    """Every metric of the plan for which the sets are too small."""
    problems = []
    for extractor in extractors:
        extractor_plan = plan_for(extractor, extractors, plan)
        if extractor_plan is None:
            continue
        for key in extractor_plan.metrics:
            reason = _shortage(METRICS[key], extractor, plan, n_generated, n_real)
            if reason is not None:
                problems.append(f"{label}: {reason}")
    return problems


def _all_metrics_problems(
    plan: Plan, extractors: Sequence[Extractor], label: str, n_generated: int, n_real: int | None
) -> list[str]:
    """Nothing if the sets are large enough for one metric; else the shortages of all metrics."""
    problems = []
    for extractor in extractors:
        for metric in METRICS.values():
            if metric.is_extra or metric.train or not suits(metric, extractor):
                continue  # only computed when it is named
            reason = _shortage(metric, extractor, plan, n_generated, n_real)
            if reason is None:
                return []
            problems.append(f"{label}: {reason}")
    return problems


def _shortage(
    metric: Metric, extractor: Extractor, plan: Plan, n_generated: int, n_real: int | None
) -> str | None:
    """Why a metric cannot be computed of sets of these sizes; None where it can."""
    options = {**metric.options, **plan.options.get(metric.key, {})}
    required = metric.required(options)  # whatever --allow_small says
    sizes = {"generated": n_generated}
    if metric.real and n_real is not None:
        sizes["real"] = n_real
    for role, count in sizes.items():
        if count < required:
            settings = ", ".join(f"{name}={value}" for name, value in options.items())
            with_settings = f" with {settings}" if settings else ""
            return f"{metric.key}{with_settings} needs at least {required} {role} images, got {count}"
    if plan.allow_small:
        return None
    width = _feature_width(extractor, metric)
    minima = {"generated": metric.minimum, "real": metric.minimum_real or metric.minimum}
    try:
        for role, count in sizes.items():
            check_size(metric.key, role, count, minima[role](width, options), allow_small=False)
    except TooFewImages as error:
        return str(error)
    return None


def _feature_width(extractor: Extractor, metric: Metric) -> int:
    """Columns of the features that a metric reads, found with one blank image."""
    layer = extractor.layer_of(metric.generated[0])
    if layer is None:
        return 0  # `check_plan` refuses an extractor that has no layer for the metric
    blank = torch.zeros(1, 3, extractor.side, extractor.side, dtype=torch.uint8)
    return extractor.with_layers_for(metric.generated)(blank)[layer].shape[1]
