"""Scores of sets from their features: every metric that applies, with interval, floor and identity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from diffadapt.common.messages import did_you_mean
from diffadapt.evaluation.features.extractors import Extractor
from diffadapt.evaluation.record import ImageRow, Score
from diffadapt.evaluation.scored_set import ScoredSet
from diffadapt.metrics.copying import nearest_images
from diffadapt.metrics.evaluate import Evaluation, evaluate
from diffadapt.metrics.feature_set import FeatureSet
from diffadapt.metrics.manifold import realism
from diffadapt.metrics.naming import score_name
from diffadapt.metrics.registry import METRICS, Metric
from diffadapt.metrics.similarity import text_similarities

ALL = "all"
REALISM_K = 3
LIKENESS = ("clip_i", "dino")  # metrics of one subject
LACKING = {  # role -> what is said where an extractor has no layer for it
    "pixels": "it needs an lpips: extractor",
    "spatial": "sFID's layer is Inception's: give --extractor inception",
    "raw": "CLIP-FID needs a clip: extractor",
}
KINDS = {"embedded:clip": "clip", "embedded:digits": "digits", "dinov2": "dino"}  # name or its head -> kind


@dataclass(frozen=True)
class Plan:
    """What is computed.

    Attributes:
        metrics: keys of the registry; () for all that apply.
        options: metric -> options that differ from its defaults.
        allow_small: score below the minimum numbers of images too, and stamp it.
        intervals, floor: whether to spend the time for them.
    """

    metrics: tuple[str, ...] = ()
    options: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    seed: int = 0
    allow_small: bool = False
    intervals: bool = True
    floor: bool = True


def parse_metrics(text: str) -> tuple[str, ...]:
    """`fid,kid` -> keys; `all` -> (). Raises: ValueError naming the nearest metric."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in METRICS and name != ALL:
            raise ValueError(f"unknown metric {name!r}{did_you_mean(name, [*METRICS, ALL])}")
    if not names:
        raise ValueError("--metrics names no metric; give some with commas, or all")
    return () if ALL in names else names


def check_plan(
    plan: Plan,
    extractors: Sequence[Extractor],
    *,
    has_reference: bool,
    has_prompts: bool,
    only_statistics: bool = False,
    has_train: bool = False,
) -> None:
    """Before any image is read.

    Args:
        only_statistics: whether the reference consists of Frechet statistics, without images or features.

    Raises: ValueError for a metric asked for that no extractor can give, and for an extractor with which
        nothing can be computed.
    """
    facts = {
        "has_reference": has_reference,
        "has_prompts": has_prompts,
        "only_statistics": only_statistics,
        "has_train": has_train,
    }
    for extractor in () if plan.metrics else extractors:
        suited = [metric for metric in METRICS.values() if suits(metric, extractor) and not metric.is_extra]
        lacking = [_missing(metric, extractor, **facts) for metric in suited]
        if None not in lacking:
            why = "; ".join(dict.fromkeys(reason for reason in lacking if reason))
            raise ValueError(f"no metric can be computed with {extractor.name!r}: {why}")
    for key in plan.metrics:
        metric, reasons = METRICS[key], []
        for extractor in extractors:
            reason = _missing(metric, extractor, **facts)
            if reason is None:
                break
            reasons.append(reason)
        else:
            raise ValueError(f"{key} cannot be computed: {'; '.join(reasons)}")


def plan_for(extractor: Extractor, extractors: Sequence[Extractor], plan: Plan) -> Plan | None:
    """What one of several extractors computes of the metrics named: not what another is meant for.

    None: nothing.
    `clip_i,dino` on CLIP and DINO are two scores, not four; on CLIP alone both are computed, under its name.
    """
    if not plan.metrics:
        return plan
    kept = []
    for key in plan.metrics:
        metric = METRICS[key]
        meant = [other for other in extractors if suits(metric, other) and gives(metric, other)]
        if gives(metric, extractor) and (extractor in meant or not meant):
            kept.append(key)
    return replace(plan, metrics=tuple(kept)) if kept else None


@dataclass
class ScoringResult:
    """What came of one set under one extractor.

    Attributes:
        refused: score -> why the rules do not allow it, such as too few images.
        failed: score -> why it is missing although it was asked for by name, or should have been possible.
    """

    scores: list[Score] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def with_layers(extractor: Extractor, plan: Plan) -> Extractor:
    """The extractor with the layers that only the metrics named need, such as sFID's."""
    roles = [role for key in plan.metrics for role in METRICS[key].generated]
    return extractor.with_layers_for(roles)


def score_set(
    label: str,
    generated: ScoredSet,
    real: ScoredSet | None,
    extractor: Extractor,
    plan: Plan,
    train: ScoredSet | None = None,
) -> ScoringResult:
    """All scores of one set under one extractor. A metric that cannot be computed costs itself alone."""
    own = generated.feature_sets.get(extractor.name)
    reference = real and real.feature_sets.get(extractor.name)
    training = train and train.feature_sets.get(extractor.name)
    is_named = bool(plan.metrics)
    scored = ScoringResult()
    for key in plan.metrics or METRICS:
        metric = METRICS[key]
        name = f"{label}: {_name(metric.scores[0], metric, extractor)}"
        if own is None or not _applies(metric, extractor, own, reference, training, is_named=is_named):
            if is_named:
                scored.failed[name] = _unread_roles(metric, own, reference, training)
            continue
        try:
            scores = _scores(label, metric, own, reference, training, extractor, plan, real, train)
        except ValueError as error:  # too few images, also where none of the rules can be waived
            (scored.failed if is_named else scored.refused)[name] = str(error)
        except Exception as error:  # one metric's fault must not cost the others
            scored.failed[name] = f"{type(error).__name__}: {error}"
        else:
            for score in scores:
                if math.isfinite(score.value):
                    scored.scores.append(score)
                else:
                    scored.failed[f"{label}: {score.name}"] = f"its value is {score.value}"
    return scored


def image_rows(
    label: str, generated: ScoredSet, real: ScoredSet | None, extractor: Extractor
) -> list[ImageRow]:
    """Figures of each image: likeness to its text, realism, and the nearest reference image."""
    own, reference = generated.feature_sets[extractor.name], real and real.feature_sets[extractor.name]
    values: dict[str, Tensor] = {}
    nearest: list[str | None] = [None] * len(generated.infos)
    if "features" in own.roles and "texts" in own.roles:
        values["clip_t"] = text_similarities(images=own["unit"], texts=own["texts"])
    if reference is not None and "features" in reference.roles and "features" in own.roles:
        if reference.n > REALISM_K:
            values["realism"] = realism(real=reference["features"], generated=own["features"], k=REALISM_K)
        found = nearest_images(training=reference["unit"], generated=own["unit"])
        values["nearest_similarity"] = found.similarity
        if real.load_image is not None:
            nearest = [real.infos[row].name for row in found.index.tolist()]
    seeds = generated.summary.made.get("seeds") or [None] * len(nearest)
    figures = {name: column.tolist() for name, column in values.items()}
    return [
        ImageRow(
            label,
            facts.name,
            {name: column[row] for name, column in figures.items()},
            nearest[row],
            "reference" if nearest[row] is not None else None,
            generated.prompts[row] if generated.prompts else None,
            seeds[row],
        )
        for row, facts in enumerate(generated.infos)
    ]


def kind_of(extractor: Extractor) -> str:
    """inception, vgg16, clip, dino, lpips, digits, or the module of one's own."""
    head = extractor.name.partition(":")[0]
    return KINDS.get(extractor.name) or KINDS.get(head) or head


def _scores(
    label: str, metric: Metric, own: FeatureSet, reference: FeatureSet | None, training: FeatureSet | None,
    extractor: Extractor, plan: Plan, real: ScoredSet | None, train: ScoredSet | None,
) -> list[Score]:  # fmt: skip
    options = dict(plan.options.get(metric.key, {}))
    network = _squared_distance if extractor.perceptual_layer else None
    result = evaluate(
        metric.key,
        generated=own,
        real=reference,
        train=training,
        seed=plan.seed,
        allow_small=plan.allow_small,
        intervals=plan.intervals,
        floor=plan.floor,
        network=network,
        metric_options=options,
    )
    identity = _identity(metric, result, extractor, plan, real, train)
    notes = result.notes
    if extractor.perceptual_layer:
        notes = (lpips_size(extractor), *notes)
    if metric.key in LIKENESS:
        notes = (*notes, "mean over all real images: a likeness to a subject only where all show it")
    return [
        Score(
            _name(score, metric, extractor),
            metric.key,
            label,
            estimate.value,
            estimate.interval,
            dict(result.n),
            (result.floor or {}).get(score),
            metric.better,
            {**identity, "score": score},
            notes,
        )
        for score, estimate in result.values.items()
    ]


def _identity(
    metric: Metric,
    result: Evaluation,
    extractor: Extractor,
    plan: Plan,
    real: ScoredSet | None,
    train: ScoredSet | None,
) -> dict[str, object]:
    """The fields of `record.IDENTITY`, but for the score's own name."""
    is_paired = bool(metric.real)
    options = dict(result.options)
    if metric.train:
        options["training_images"] = train.summary.fingerprint
    return {
        "metric": metric.key,
        "metric_version": metric.version,
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "preset": extractor.preset,
        "layer": extractor.layer_of(metric.generated[0]),
        "reference": real.summary.fingerprint if is_paired else None,
        "options": options,
        "n_generated": result.n["generated"],
        "n_real": result.n.get("real"),
        "seed": plan.seed,
    }


def _applies(
    metric: Metric,
    extractor: Extractor,
    own: FeatureSet,
    reference: FeatureSet | None,
    training: FeatureSet | None,
    *,
    is_named: bool,
) -> bool:
    """Whether the features at hand are what a metric reads and, unless named, of the kind it is for."""
    if metric.train and (training is None or not set(metric.train) <= set(training.roles)):
        return False
    if metric.is_extra and not is_named:
        return False
    has_roles = all(role in own.roles for role in metric.generated)
    has_real = not metric.real or (reference is not None and all(r in reference.roles for r in metric.real))
    return has_roles and has_real and (is_named or suits(metric, extractor))


def suits(metric: Metric, extractor: Extractor) -> bool:
    """CLIP-I is not computed from DINO features, nor the other way round, unless asked for by name."""
    kind = kind_of(extractor)
    if metric.key == "copy_rate":
        return kind in ("clip", "dino")
    return metric.extractor == "inception" or metric.extractor == kind


def gives(metric: Metric, extractor: Extractor) -> bool:
    """Whether an extractor has the layers, and the text encoder, that a metric reads."""
    for role in metric.generated:
        if role == "texts" and extractor.embed_texts is None:
            return False
        if role == "preference" and kind_of(extractor) != "preference":
            return False
        if role not in ("texts", "groups") and extractor.layer_of(role) is None:
            return False
    return True


def _unread_roles(
    metric: Metric, own: FeatureSet | None, reference: FeatureSet | None, training: FeatureSet | None
) -> str:
    """Why a metric that was asked for by name has nothing to read."""
    if own is None:
        return "the set has no features of this extractor"
    sides = (
        ("generated", metric.generated, own),
        ("real", metric.real, reference),
        ("training", metric.train, training),
    )
    for side, roles, inputs in sides:
        lacking = [role for role in roles if inputs is None or role not in inputs.roles]
        if lacking:
            return f"the {side} set has no {lacking[0]}"
    return "it does not apply"


def _missing(
    metric: Metric,
    extractor: Extractor,
    *,
    has_reference: bool,
    has_prompts: bool,
    only_statistics: bool,
    has_train: bool,
) -> str | None:
    for role in metric.generated:
        if role == "preference" and kind_of(extractor) != "preference":
            return "it needs a model of preference: give --preference module:Class"
        if role not in ("texts", "groups") and extractor.layer_of(role) is None:
            return LACKING.get(role, f"{extractor.name} gives no {role}")
        if role == "texts" and extractor.embed_texts is None:
            return f"{extractor.name} knows no texts; use a clip: extractor"
        if role in ("texts", "groups") and not has_prompts:
            return (
                "it needs the images' prompts: give --captions, or draw them with --adapters, --run or "
                "`diffadapt sample`"
            )
    if metric.train and not has_train:
        return "it needs the images trained on: give --train"
    if metric.real and not has_reference:
        return "it needs a --reference"
    if only_statistics and metric.real not in ((), ("statistics",)):
        return "the --reference holds statistics alone, for the Frechet distance; name its images"
    return None


def lpips_size(extractor: Extractor) -> str:
    """The pixels on which LPIPS was taken, which its value depends on."""
    if extractor.preset == "none":
        return "LPIPS of the images at their native size"
    return f"LPIPS of the images at {extractor.side} x {extractor.side} pixels"


def _name(score: str, metric: Metric, extractor: Extractor) -> str:
    """Its name; with the layer where an extractor's cosines and distances are of different layers."""
    role = metric.generated[0]
    is_split = "unit" in extractor.role_layers and role == "features"
    return score_name(score, extractor.name, extractor.layer_of(role) if is_split else None)


def _squared_distance(first: Tensor, second: Tensor) -> Tensor:
    """LPIPS of two images from the rows of an lpips extractor."""
    return (first - second).square().sum(dim=1)
