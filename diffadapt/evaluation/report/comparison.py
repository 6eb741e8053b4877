"""Runs against a first one: differences of their scores and of their images' figures, or a refusal.

Images drawn with the same prompts and seeds are pairs: their differences vary less than the images do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.evaluation.features.feature_file import file_name, read_features
from diffadapt.evaluation.record import ImageRow, Score, differences
from diffadapt.evaluation.report.compared_runs import Run
from diffadapt.metrics.bindings import MetricCall
from diffadapt.metrics.evaluate import evaluate
from diffadapt.metrics.feature_set import FeatureSet
from diffadapt.metrics.intervals import (
    Interval,
    Z,
    clustered_interval,
    half_samples_interval,
    mean_interval,
    normal_interval,
)
from diffadapt.metrics.kernel import paired_kid_difference
from diffadapt.metrics.metric import Metric
from diffadapt.metrics.registry import METRICS


@dataclass(frozen=True)
class Difference:
    """Of one score or figure of two runs.

    Attributes:
        value: the run's minus the first run's.
        paired: over the same prompts and seeds.
        note: why there is no interval, "" where nothing is to be said.
    """

    name: str
    label: str
    first: float
    other: float
    value: float
    interval: Interval | None
    paired: bool
    better: str
    note: str = ""

    @property
    def verdict(self) -> str:
        """better, worse, or what the interval leaves open."""
        if self.interval is None:
            return "no interval"
        if self.interval.low <= 0 <= self.interval.high:
            return "no clear difference"
        if not self.better:
            return "differs"
        return "better" if (self.value < 0) == (self.better == "lower") else "worse"


def compare(runs: Sequence[Run]) -> list[Difference]:
    """Every run against the first, score by score, then figure by figure of the images.

    Raises: ValueError when there is nothing to compare, or naming the first run and field of a score's
        identity that differs.
    """
    if len(runs) < 2:
        raise ValueError(f"a comparison needs two generated sets, got {len(runs)}")
    first, found = runs[0], []
    for run in runs[1:]:
        shared = [name for name in first.scores if name in run.scores]
        if not shared:
            raise ValueError(
                f"{first.label} and {run.label} have no score in common: {', '.join(first.scores) or 'none'} "
                f"against {', '.join(run.scores) or 'none'}"
            )
        _refuse_different(first, run, shared)
        pairs = paired_rows(first.rows, run.rows)
        found += [_score_difference(first, run, name, pairs) for name in shared]
        covered = {first.scores[name].metric for name in shared}
        both = (name for a, b in pairs for name in a.values if name in b.values)
        names = dict.fromkeys(name for name in both if name not in covered)
        names = [name for name in names if _finite_pairs(pairs, name)]
        found += [_figure_difference(run.label, name, pairs) for name in names]
    return found


def paired_rows(first: Sequence[ImageRow], other: Sequence[ImageRow]) -> list[tuple[ImageRow, ImageRow]]:
    """Images of one prompt and seed in both sets; none where prompts or seeds are not known or not unique."""

    def by_origin(rows: Sequence[ImageRow]) -> dict[tuple, ImageRow]:
        known = [row for row in rows if row.prompt is not None and row.seed is not None]
        found = {(row.prompt, row.seed): row for row in known}
        return found if len(found) == len(known) else {}

    known = by_origin(other)
    return [(row, known[key]) for key, row in by_origin(first).items() if key in known]


def _refuse_different(first: Run, run: Run, names: Sequence[str]) -> None:
    for name in names:
        reasons = differences(first.scores[name], run.scores[name])
        if reasons:
            raise ValueError(
                f"{name} of {first.label} and of {run.label} cannot be compared: {'; '.join(reasons)}; "
                "evaluate both in the same way"
            )


def _score_difference(first: Run, run: Run, name: str, pairs: list) -> Difference:
    a = first.scores[name]
    b = run.scores[name]
    value = b.value - a.value
    facts = {"name": name, "label": run.label, "first": a.value, "other": b.value, "value": value}
    facts["better"] = a.better
    is_complete = len(pairs) == len(first.rows) == len(run.rows)
    if is_complete and len(pairs) > 1:
        if all(a.metric in row.values for pair in pairs for row in pair):
            return _judged(facts, _paired_interval(pairs, a.metric), paired=True)
        of_pairs = _PairedScore.of(first, run, a, pairs)
        if of_pairs is not None:
            try:
                return _judged(facts, of_pairs.interval(value), paired=True)
            except ValueError as error:
                return Difference(**facts, interval=None, paired=True, note=f"no interval: {error}")
    if a.interval is None or b.interval is None:
        return Difference(**facts, interval=None, paired=False)
    error = math.hypot(*((own.high - own.low) / (2 * Z) for own in (a.interval, b.interval)))
    method = "normal, both intervals' widths as of independent sets"
    return _judged(facts, normal_interval(value, error, method), paired=False)


def _judged(facts: dict, interval: Interval, *, paired: bool) -> Difference:
    """The difference; an interval of no width is left out: that nothing varied does not make it sure."""
    is_point = interval.high - interval.low <= 1e-9 * abs(facts["value"])
    if is_point and facts["value"] != 0:
        note = "no interval: the difference was the same in all parts of the images"
        return Difference(**facts, interval=None, paired=paired, note=note)
    return Difference(**facts, interval=interval, paired=paired)


def _figure_difference(label: str, name: str, pairs: list) -> Difference:
    pairs = _finite_pairs(pairs, name)
    means = [sum(row.values[name] for row in side) / len(pairs) for side in zip(*pairs, strict=True)]
    value = means[1] - means[0]
    facts = {"name": f"{name} of each image", "label": label, "first": means[0], "other": means[1]}
    facts |= {"value": value, "better": ""}
    if len(pairs) < 2:
        return Difference(**facts, interval=None, paired=True)
    return _judged(facts, _paired_interval(pairs, name), paired=True)


def _finite_pairs(pairs: list, name: str) -> list:
    """The pairs of which a figure can be subtracted; the realism of a copy of a real image is infinite."""
    return [pair for pair in pairs if all(math.isfinite(row.values.get(name, math.nan)) for row in pair)]


def _paired_interval(pairs: list, name: str) -> Interval:
    """Interval of the mean change of a figure from image to image of a pair."""
    changes = torch.tensor([b.values[name] - a.values[name] for a, b in pairs], dtype=torch.float64)
    return _interval_of_changes(changes, pairs)


def _interval_of_changes(changes: Tensor, pairs: list) -> Interval:
    over, clusters = _clusters(pairs)
    if clusters is None:
        return mean_interval(changes, over="paired images")
    return clustered_interval(changes, clusters, over=over)


def _clusters(pairs: list) -> tuple[str, list | None]:
    """Images of one subject (the folder of their names), or else of one prompt, resemble each other.

    Returns: what the clusters are called, and that of each pair; None where no two pairs share one.
    """
    groups = {
        "folders of paired images": [row.name.rpartition("/")[0] for row, _ in pairs],
        "prompts of paired images": [row.prompt for row, _ in pairs],
    }
    for over, clusters in groups.items():
        if 2 <= len(set(clusters)) < len(clusters):
            return over, clusters
    return "", None


@dataclass(frozen=True)
class _PairedScore:
    """A score of two runs whose records kept their features, image by image in the same order."""

    metric: Metric
    score: Score
    options: dict[str, object]
    sides: tuple[FeatureSet, FeatureSet]
    real: FeatureSet | None
    pairs: list

    @classmethod
    def of(cls, first: Run, run: Run, score: Score, pairs: list) -> _PairedScore | None:
        """None where a record kept no features, or the metric reads more than they hold."""
        metric = METRICS.get(score.metric)
        if metric is None or len(metric.generated) != 1 or metric.train:
            return None
        sides = (_features(first, first.generated, score), _features(run, run.generated, score))
        real = _features(first, "reference", score) if metric.real else None
        if None in sides or (metric.real and real is None):
            return None
        options = {name: value for name, value in score.identity["options"].items() if name in metric.options}
        return cls(metric, score, options, sides, real, pairs)

    def interval(self, value: float) -> Interval:
        """Of the difference of both scores, by the best method there is for the metric.

        Raises: ValueError where the images are too few for one.
        """
        over, clusters = _clusters(self.pairs)
        if self.metric.per_image is not None:
            first, other = (
                self.metric.per_image(MetricCall(side, self.real, self.options)) for side in self.sides
            )
            return _interval_of_changes(other - first, self.pairs)
        if self.metric.key == "kid" and clusters is None:
            first, other = (side["features"] for side in self.sides)
            _, variance = paired_kid_difference(real=self.real["features"], first=first, other=other)
            return normal_interval(value, variance**0.5, "normal, variance of the U-statistic of the pairs")
        k = self.options.get("k")
        if k is not None and len(self.pairs) // 2 <= 2 * k:
            raise ValueError(f"halves of {len(self.pairs)} pairs are too few for {k} neighbours")
        return half_samples_interval(value, self._difference, len(self.pairs), clusters=clusters, over=over)

    def _difference(self, rows: Tensor) -> float:
        """The difference of the scores of some of the pairs."""
        place = self.metric.scores.index(self.score.identity.get("score", self.metric.scores[0]))
        quick = {"intervals": False, "floor": False, "allow_small": True, "metric_options": self.options}
        found = []
        for side in self.sides:
            made = evaluate(
                self.metric.key,
                generated=side.rows(rows),
                real=self.real,
                seed=self.score.identity["seed"],
                **quick,
            )
            found.append(list(made.values.values())[place].value)
        return found[1] - found[0]


def _features(run: Run, label: str, score: Score) -> FeatureSet | None:
    folder = run.record.sets[label].features if label in run.record.sets else None
    if folder is None or score.metric not in METRICS:
        return None
    path = run.path.parent / folder / file_name(score.identity["extractor"])
    if not path.is_file():
        return None
    return FeatureSet(
        {METRICS[score.metric].generated[0]: read_features(path).layers[score.identity["layer"]]}
    )
