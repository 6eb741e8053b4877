"""Numbers of images against what metrics need, told before any image goes through a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from diffadapt.evaluation.features.extractors import Extractor
from diffadapt.evaluation.scoring import Plan, plan_for, suits
from diffadapt.metrics.metric import Metric
from diffadapt.metrics.registry import METRICS
from diffadapt.metrics.sample_size import TooFewImages, check_size

Options = Mapping[str, object]

# Images of each set without which a metric has no value, whatever --allow_small says; 2 of those not listed.
NEEDED: dict[str, Callable[[Options], int]] = {
    "fid_infinity": lambda options: 20,  # a line through Frechet distances of subsets
    "kid_subsets": lambda options: options["size"],
    "inception_score": lambda options: 2 * options["splits"],
    "is_gap": lambda options: 2 * options["splits"],
    "precision_recall": lambda options: options["k"] + 1,
    "density_coverage": lambda options: options["k"] + 1,
    "msid": lambda options: options["k"] + 2,
    "clip_i": lambda options: 1,
    "dino": lambda options: 1,
}


def check_sizes(
    plan: Plan, extractors: Sequence[Extractor], generated: Mapping[str, int], n_real: int | None
) -> None:
    """Whether the sets are large enough for what is to be computed.

    Args:
        generated: label -> number of images.
        n_real: images of the reference; None where there is none, or only its statistics are known.

    Raises: ValueError that lists every metric asked for by name that a set is too small for; without names,
        the sets of which nothing at all can be computed.
    """
    problems: list[str] = []
    for label, n in generated.items():
        if plan.metrics:
            problems += _of_named(plan, extractors, label, n, n_real)
        else:
            problems += _of_all(plan, extractors, label, n, n_real)
    if problems:
        listed = "\n".join(f"  {line}" for line in dict.fromkeys(problems))
        raise ValueError(f"too few images; nothing was computed:\n{listed}")


def _of_named(
    plan: Plan, extractors: Sequence[Extractor], label: str, n: int, n_real: int | None
) -> list[str]:
    problems = []
    for extractor in extractors:
        its_plan = plan_for(extractor, extractors, plan)
        for key in its_plan.metrics if its_plan is not None else ():
            reason = _shortage(METRICS[key], extractor, plan, n, n_real)
            if reason is not None:
                problems.append(f"{label}: {reason}")
    return problems


def _of_all(plan: Plan, extractors: Sequence[Extractor], label: str, n: int, n_real: int | None) -> list[str]:
    reasons = []
    for extractor in extractors:
        for metric in METRICS.values():
            if metric.is_extra or metric.train or not suits(metric, extractor):
                continue
            reason = _shortage(metric, extractor, plan, n, n_real)
            if reason is None:
                return []
            reasons.append(f"{label}: {reason}")
    return reasons


def _shortage(metric: Metric, extractor: Extractor, plan: Plan, n: int, n_real: int | None) -> str | None:
    """Why a metric cannot be computed of sets of these sizes; None where it can."""
    options = {**metric.options, **plan.options.get(metric.key, {})}
    needed = NEEDED.get(metric.key, lambda options: 2)(options)
    sizes = {"generated": n}
    if metric.real and n_real is not None:
        sizes["real"] = n_real
    for role, count in sizes.items():
        if count < needed:
            settings = ", ".join(f"{name}={value}" for name, value in options.items())
            with_settings = f" with {settings}" if settings else ""
            return f"{metric.key}{with_settings} needs at least {needed} {role} images, got {count}"
    if plan.allow_small:
        return None
    width = _width(extractor, metric)
    minima = {"generated": metric.minimum, "real": metric.minimum_real or metric.minimum}
    try:
        for role, count in sizes.items():
            check_size(metric.key, role, count, minima[role](width, options), allow_small=False)
    except TooFewImages as error:
        return str(error)
    return None


def _width(extractor: Extractor, metric: Metric) -> int:
    """Columns of the features that a metric reads, from one blank image."""
    layer = extractor.layer_of(metric.generated[0])
    if layer is None:
        return 0  # the extractor does not give what the metric reads, which is another check's to tell
    blank = torch.zeros(1, 3, extractor.side, extractor.side, dtype=torch.uint8)
    return extractor.serving(metric.generated)(blank)[layer].shape[1]
