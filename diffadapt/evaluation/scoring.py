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
REALISM_K = 3  # neighbours, as in the paper on improved precision and recall
LIKENESS_METRICS = ("clip_i", "dino")  # meant for sets of one subject
LIKENESS_NOTE = "mean over all real images: a likeness to a subject only where all show it"
PROMPT_ROLES = ("texts", "groups")  # come from prompts, not from a layer
MISSING_LAYER = {  # role -> what is said where an extractor has no layer for it
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
        seed: of subsets, bootstraps, probes and floors.
        allow_small: score below the minimum numbers of images too, with a note.
        intervals: whether to spend the time for them.
        floor: whether to spend the time for it.
    """

    metrics: tuple[str, ...] = ()
    options: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    seed: int = 0
    allow_small: bool = False
    intervals: bool = True
    floor: bool = True


@dataclass
class ScoringResult:
    """The scores of one set under one extractor.

    Attributes:
        refused: score -> why the rules do not allow it, such as too few images.
        failed: score -> why it is missing although it was asked for by name, or should have been possible.
    """

    scores: list[Score] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def parse_metrics(text: str) -> tuple[str, ...]:
    """`fid,kid` to keys of the registry; `all` to ().

    Raises:
        ValueError: a metric is unknown; the message names the nearest.
    """
    names: list[str] = []
    for name in text.split(","):
        if name.strip() and name.strip() not in names:
            names.append(name.strip())
    for name in names:
        if name not in METRICS and name != ALL:
            raise ValueError(f"unknown metric {name!r}{did_you_mean(name, [*METRICS, ALL])}")
    if not names:
        raise ValueError("--metrics names no metric; give some with commas, or all")
    return () if ALL in names else tuple(names)


def check_plan(
    plan: Plan,
    extractors: Sequence[Extractor],
    *,
    has_reference: bool,
    has_prompts: bool,
    only_statistics: bool = False,
    has_train: bool = False,
) -> None:
    """Checks, before any image is read, that the metrics can be computed.

    Args:
        only_statistics: whether the reference consists of Frechet statistics, without images or features.

    Raises:
        ValueError: no extractor can serve a metric asked for by name, or an extractor serves no metric.
    """
    sources = {
        "has_reference": has_reference,
        "has_prompts": has_prompts,
        "only_statistics": only_statistics,
        "has_train": has_train,
    }
    if not plan.metrics:
        for extractor in extractors:
            reasons = []
            for metric in METRICS.values():
                if _is_for_all(metric, extractor):
                    reasons.append(_obstacle(metric, extractor, **sources))
            if None not in reasons:  # not one metric without an obstacle
                raise ValueError(
                    f"no metric can be computed with {extractor.name!r}: {'; '.join(dict.fromkeys(reasons))}"
                )
    for key in plan.metrics:
        reasons = []
        for extractor in extractors:
            reasons.append(_obstacle(METRICS[key], extractor, **sources))
        if None not in reasons:  # one extractor without an obstacle will do
            raise ValueError(f"{key} cannot be computed: {'; '.join(reasons)}")


def plan_for(extractor: Extractor, extractors: Sequence[Extractor], plan: Plan) -> Plan | None:
    """The part of a plan that one of several extractors computes; None where there is none.

    A named metric is left to the extractors that it is meant for: `clip_i,dino` on CLIP and DINO are two
    scores, not four; on CLIP alone both are computed, under its name.
    """
    if not plan.metrics:
        return plan  # `score_set` passes over what does not apply
    keys = []
    for key in plan.metrics:
        metric = METRICS[key]
        meant_for = []
        for other in extractors:
            if suits(metric, other) and provides_roles(metric, other):
                meant_for.append(other)
        if provides_roles(metric, extractor) and (extractor in meant_for or not meant_for):
            keys.append(key)
    return replace(plan, metrics=tuple(keys)) if keys else None


def with_layers(extractor: Extractor, plan: Plan) -> Extractor:
    """The extractor with the layers that only metrics asked for by name need, such as sFID's."""
    roles: list[str] = []
    for key in plan.metrics:
        roles += METRICS[key].generated
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
    is_named = bool(plan.metrics)
    features = _features_by_side(extractor, generated, real, train)
    result = ScoringResult()
    for key in plan.metrics or METRICS:
        metric = METRICS[key]
        name = f"{label}: {_score_name(metric.scores[0], metric, extractor)}"
        missing = _missing_role(metric, features)
        if missing is not None or not (is_named or _is_for_all(metric, extractor)):
            if is_named:  # of "all", what does not apply is passed over in silence
                result.failed[name] = missing
            continue
        try:
            scores = score_metric(label, metric, generated, real, extractor, plan, train)
        except ValueError as error:  # too few images, also where no option allows fewer
            if is_named:
                result.failed[name] = str(error)
            else:
                result.refused[name] = str(error)
        except Exception as error:  # one metric's fault must not cost the others
            result.failed[name] = f"{type(error).__name__}: {error}"
        else:
            for score in scores:
                if math.isfinite(score.value):
                    result.scores.append(score)
                else:
                    result.failed[f"{label}: {score.name}"] = f"its value is {score.value}"
    return result


def score_metric(
    label: str,
    metric: Metric,
    generated: ScoredSet,
    real: ScoredSet | None,
    extractor: Extractor,
    plan: Plan,
    train: ScoredSet | None = None,
) -> list[Score]:
    """The scores of one metric, one for each of `metric.scores`.

    Raises:
        ValueError: the metric cannot be computed of these sets.
    """
    features = _features_by_side(extractor, generated, real, train)
    result = evaluate(
        metric.key,
        generated=features["generated"],
        real=features["real"],
        train=features["training"],
        seed=plan.seed,
        allow_small=plan.allow_small,
        intervals=plan.intervals,
        floor=plan.floor,
        network=_squared_distance if extractor.is_perceptual else None,
        metric_options=plan.options.get(metric.key, {}),
    )
    identity = _identity(metric, result, extractor, plan, real, train)
    notes = result.notes
    if extractor.is_perceptual:
        notes = (lpips_size(extractor), *notes)
    if metric.key in LIKENESS_METRICS and "subjects" not in features["generated"].roles:
        notes = (*notes, LIKENESS_NOTE)
    scores = []
    for name, estimate in result.values.items():
        score = Score(
            name=_score_name(name, metric, extractor),
            metric=metric.key,
            generated=label,
            value=estimate.value,
            interval=estimate.interval,
            n=dict(result.n),
            floor=None if result.floor is None else result.floor[name],
            better=metric.better,
            identity={**identity, "score": name},
            notes=notes,
        )
        scores.append(score)
    return scores


def image_rows(
    label: str, generated: ScoredSet, real: ScoredSet | None, extractor: Extractor
) -> list[ImageRow]:
    """Values of each image: likeness to its text, realism, and the nearest reference image."""
    features = generated.feature_sets[extractor.name]
    reference = None if real is None else real.feature_sets[extractor.name]
    columns: dict[str, Tensor] = {}  # name -> (N,)
    nearest_names: list[str] | None = None
    if "features" in features.roles and "texts" in features.roles:
        columns["clip_t"] = text_similarities(images=features["unit"], texts=features["texts"])
    if reference is not None and "features" in reference.roles and "features" in features.roles:
        if reference.n > REALISM_K:  # each real image needs as many others
            columns["realism"] = realism(
                real=reference["features"], generated=features["features"], k=REALISM_K
            )
        nearest = nearest_images(training=reference["unit"], generated=features["unit"])
        columns["nearest_similarity"] = nearest.similarity
        if real.load_image is not None:
            nearest_names = []
            for row in nearest.index.tolist():
                nearest_names.append(real.infos[row].name)
    values = values_by_image(columns, len(generated.infos))
    seeds = generated.summary.made.get("seeds")
    rows = []
    for number, info in enumerate(generated.infos):
        row = ImageRow(
            generated=label,
            name=info.name,
            values=values[number],
            nearest=nearest_names[number] if nearest_names else None,
            nearest_in="reference" if nearest_names else None,
            prompt=generated.prompts[number] if generated.prompts else None,
            seed=seeds[number] if seeds else None,
        )
        rows.append(row)
    return rows


def values_by_image(columns: Mapping[str, Tensor], count: int) -> list[dict[str, float]]:
    """Columns (N,) by name as the values of each of `count` images by name."""
    rows: list[dict[str, float]] = [{} for _ in range(count)]
    for name, column in columns.items():
        for row, value in zip(rows, column.tolist(), strict=True):
            row[name] = value
    return rows


def kind_of(extractor: Extractor) -> str:
    """inception, vgg16, clip, dino, lpips, digits, or the module of a user's own class."""
    head = extractor.name.partition(":")[0]
    return KINDS.get(extractor.name) or KINDS.get(head) or head


def suits(metric: Metric, extractor: Extractor) -> bool:
    """Whether a metric is meant for an extractor: CLIP-I for CLIP, not for DINO, nor the other way round."""
    kind = kind_of(extractor)
    if metric.key == "copy_rate":  # by cosine, which says "the same image" in these two spaces
        return kind in ("clip", "dino")
    # Inception's metrics can be taken of any features: `naming` calls them otherwise then
    return metric.extractor == "inception" or metric.extractor == kind


def provides_roles(metric: Metric, extractor: Extractor) -> bool:
    """Whether an extractor has the layers, and the text encoder, that a metric reads."""
    for role in metric.generated:
        if role == "texts" and extractor.embed_texts is None:
            return False
        if role == "preference" and kind_of(extractor) != "preference":
            return False
        if role not in PROMPT_ROLES and extractor.layer_of(role) is None:
            return False
    return True


def lpips_size(extractor: Extractor) -> str:
    """The size of the images under LPIPS, on which its value depends."""
    if extractor.preset == "none":
        return "LPIPS of the images at their native size"
    return f"LPIPS of the images at {extractor.side} x {extractor.side} pixels"


def _features_by_side(
    extractor: Extractor, generated: ScoredSet, real: ScoredSet | None, train: ScoredSet | None
) -> dict[str, FeatureSet | None]:
    """The features of all sets under one extractor, by their names in messages."""
    sets = {"generated": generated, "real": real, "training": train}
    features: dict[str, FeatureSet | None] = {}
    for side, scored_set in sets.items():
        features[side] = None if scored_set is None else scored_set.feature_sets.get(extractor.name)
    return features


def _missing_role(metric: Metric, features: Mapping[str, FeatureSet | None]) -> str | None:
    """Why a metric has nothing to read; None where every role is there."""
    if features["generated"] is None:
        return "the set has no features of this extractor"
    required = {"generated": metric.generated, "real": metric.real, "training": metric.train}
    for side, roles in required.items():
        feature_set = features[side]
        for role in roles:
            if feature_set is None or role not in feature_set.roles:
                return f"the {side} set has no {role}"
    return None


def _is_for_all(metric: Metric, extractor: Extractor) -> bool:
    """Whether `--metrics all` computes a metric with an extractor."""
    return suits(metric, extractor) and not metric.is_extra


def _obstacle(
    metric: Metric,
    extractor: Extractor,
    *,
    has_reference: bool,
    has_prompts: bool,
    only_statistics: bool,
    has_train: bool,
) -> str | None:
    """Why a metric cannot be computed with an extractor; None where it can."""
    for role in metric.generated:
        if role == "preference" and kind_of(extractor) != "preference":
            return "it needs a model of preference: give --preference module:Class"
        if role not in PROMPT_ROLES and extractor.layer_of(role) is None:
            return MISSING_LAYER.get(role, f"{extractor.name} gives no {role}")
        if role == "texts" and extractor.embed_texts is None:
            return f"{extractor.name} knows no texts; use a clip: extractor"
        if role in PROMPT_ROLES and not has_prompts:
            return (
                "it needs the images' prompts: give --captions, or generate them with --adapters, --run or "
                "`diffadapt sample`"
            )
    if metric.train and not has_train:
        return "it needs the images trained on: give --train"
    if metric.real and not has_reference:
        return "it needs a --reference"
    # a file of statistics is of Inception's features, which serve the Frechet distance alone
    if only_statistics and metric.real not in ((), ("statistics",)):
        return "the --reference holds statistics alone, for the Frechet distance; name its images"
    return None


def _identity(
    metric: Metric,
    result: Evaluation,
    extractor: Extractor,
    plan: Plan,
    real: ScoredSet | None,
    train: ScoredSet | None,
) -> dict[str, object]:
    """The fields of `record.IDENTITY` without the score's own name."""
    options = dict(result.options)
    if metric.train:  # the identity has no field of its own for them
        options["training_images"] = train.summary.fingerprint
    return {
        "metric": metric.key,
        "metric_version": metric.version,
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "preset": extractor.preset,
        "layer": extractor.layer_of(metric.generated[0]),
        "reference": real.summary.fingerprint if metric.real else None,  # else it had no influence
        "options": options,
        "n_generated": result.n["generated"],
        "n_real": result.n.get("real"),
        "seed": plan.seed,
    }


def _score_name(score: str, metric: Metric, extractor: Extractor) -> str:
    """The name of a score; with the layer where an extractor's cosines and distances use different layers."""
    role = metric.generated[0]
    # of DINOv2: class_token, and its copy of length 1
    layer = extractor.layer_of(role) if role == "features" and "unit" in extractor.role_layers else None
    return score_name(score, extractor.name, layer)


def _squared_distance(first: Tensor, second: Tensor) -> Tensor:
    """LPIPS of pairs of images from the rows of an lpips extractor, (B, D) and (B, D) to (B,)."""
    return (first - second).square().sum(dim=1)
