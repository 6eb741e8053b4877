"""Differences between runs: of their scores and of the values of their images, with intervals.

Images generated with the same prompts and seeds are pairs: their differences vary less than the images do.
Scores that were not computed in the same way are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.evaluation.features.feature_file import file_name, read_features
from diffadapt.evaluation.record import ImageRow, Score, differences
from diffadapt.evaluation.report.compared_runs import ComparedRun
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

Pairs = list[tuple[ImageRow, ImageRow]]  # images of one prompt and seed: of the first run, of the other


@dataclass(frozen=True)
class Difference:
    """The difference of one score, or of one value of the images, between two runs.

    Attributes:
        name: of the score or value.
        label: of the other run.
        first: the first run's score.
        other: the other run's score.
        value: the other run's score minus the first run's.
        interval: 95 % interval of the difference; None where there is none.
        paired: whether it is taken over images of the same prompts and seeds.
        better: "lower", "higher", or "" where neither is.
        note: why there is no interval; "" where there is nothing to say.
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
        """ "better" or "worse", or what the interval leaves open."""
        if self.interval is None:
            return "no interval"
        if self.interval.low <= 0 <= self.interval.high:
            return "no clear difference"
        if not self.better:
            return "differs"
        is_lower = self.value < 0  # the other run's
        return "better" if is_lower == (self.better == "lower") else "worse"


@dataclass(frozen=True)
class _Values:
    """The fields of a `Difference` before its interval is known."""

    name: str
    label: str
    first: float
    other: float
    better: str

    @property
    def change(self) -> float:
        return self.other - self.first

    def difference(self, interval: Interval | None, *, paired: bool, note: str = "") -> Difference:
        """The difference with an interval.

        An interval of no width is left out: that nothing varied does not make a difference certain.
        """
        is_point = interval is not None and interval.high - interval.low <= 1e-9 * abs(self.change)
        if is_point and self.change != 0:
            interval = None
            note = "no interval: the difference was the same in all parts of the images"
        return Difference(
            name=self.name,
            label=self.label,
            first=self.first,
            other=self.other,
            value=self.change,
            interval=interval,
            paired=paired,
            better=self.better,
            note=note,
        )


def compare(runs: Sequence[ComparedRun]) -> list[Difference]:
    """Compares every run with the first, score by score, then value by value of the images.

    Raises:
        ValueError: there is nothing to compare, or a score was not computed in the same way; names the first
            run and the fields that differ.
    """
    if len(runs) < 2:
        raise ValueError(f"a comparison needs two generated sets, got {len(runs)}")
    first = runs[0]
    results = []
    for run in runs[1:]:
        shared_names = [name for name in first.scores if name in run.scores]
        if not shared_names:
            raise ValueError(
                f"{first.label} and {run.label} have no score in common: {', '.join(first.scores) or 'none'} "
                f"against {', '.join(run.scores) or 'none'}"
            )
        _refuse_different_identities(first, run, shared_names)
        pairs = paired_rows(first.rows, run.rows)
        for name in shared_names:
            results.append(_score_difference(first, run, name, pairs))
        compared_metrics = {first.scores[name].metric for name in shared_names}
        for name in _names_of_image_values(pairs):
            finite_pairs = _finite_pairs(pairs, name)
            if name not in compared_metrics and finite_pairs:
                results.append(_image_value_difference(run.label, name, finite_pairs))
    return results


def paired_rows(first: Sequence[ImageRow], other: Sequence[ImageRow]) -> Pairs:
    """Images of one prompt and seed in both sets; none where prompts or seeds are unknown or not unique."""
    first_by_origin = _rows_by_origin(first)
    other_by_origin = _rows_by_origin(other)
    pairs = []
    for origin, row in first_by_origin.items():
        if origin in other_by_origin:
            pairs.append((row, other_by_origin[origin]))
    return pairs


def _rows_by_origin(rows: Sequence[ImageRow]) -> dict[tuple[str, int], ImageRow]:
    """(prompt, seed) -> image; empty where two images share both."""
    by_origin: dict[tuple[str, int], ImageRow] = {}
    for row in rows:
        if row.prompt is None or row.seed is None:
            continue
        if (row.prompt, row.seed) in by_origin:  # which of the two belongs to the other set's image?
            return {}
        by_origin[row.prompt, row.seed] = row
    return by_origin


def _names_of_image_values(pairs: Pairs) -> list[str]:
    """The values that both images of some pair have, in the order of first appearance."""
    names: dict[str, None] = {}
    for first, other in pairs:
        for name in first.values:
            if name in other.values:
                names.setdefault(name)
    return list(names)


def _refuse_different_identities(first: ComparedRun, run: ComparedRun, names: Sequence[str]) -> None:
    for name in names:
        reasons = differences(first.scores[name], run.scores[name])
        if reasons:
            raise ValueError(
                f"{name} of {first.label} and of {run.label} cannot be compared: {'; '.join(reasons)}; "
                "evaluate both in the same way"
            )


def _score_difference(first: ComparedRun, run: ComparedRun, name: str, pairs: Pairs) -> Difference:
    """The difference of one score, with the narrowest interval that the records allow.

    In order of preference: over pairs of images whose values the score is the mean of; over pairs of images
    whose features the records kept; from both scores' intervals, as of independent sets.
    """
    first_score = first.scores[name]
    other_score = run.scores[name]
    values = _Values(name, run.label, first_score.value, other_score.value, first_score.better)
    is_fully_paired = len(pairs) == len(first.rows) == len(run.rows)
    if is_fully_paired and len(pairs) > 1:
        # a mean over images: its difference is the mean of the pairs' differences
        if _have_value(pairs, first_score.metric):
            return values.difference(_paired_interval(pairs, first_score.metric), paired=True)
        paired_score = _PairedScore.of(first, run, first_score, pairs)
        if paired_score is not None:
            try:
                return values.difference(paired_score.interval(values.change), paired=True)
            except ValueError as error:
                return values.difference(None, paired=True, note=f"no interval: {error}")
    if first_score.interval is None or other_score.interval is None:
        return values.difference(None, paired=False)
    standard_errors = []  # of independent scores: their squares add up
    for interval in (first_score.interval, other_score.interval):
        standard_errors.append((interval.high - interval.low) / (2 * Z))
    method = "normal, both intervals' widths as of independent sets"
    interval = normal_interval(values.change, math.hypot(*standard_errors), method)
    return values.difference(interval, paired=False)


def _image_value_difference(label: str, name: str, pairs: Pairs) -> Difference:
    """The mean difference of one value of the images over pairs that both have it."""
    first_values = []
    other_values = []
    for first, other in pairs:
        first_values.append(first.values[name])
        other_values.append(other.values[name])
    first_mean = sum(first_values) / len(pairs)
    other_mean = sum(other_values) / len(pairs)
    values = _Values(f"{name} of each image", label, first_mean, other_mean, better="")
    if len(pairs) < 2:
        return values.difference(None, paired=True)
    return values.difference(_paired_interval(pairs, name), paired=True)


def _have_value(pairs: Pairs, name: str) -> bool:
    return all(name in first.values and name in other.values for first, other in pairs)


def _finite_pairs(pairs: Pairs, name: str) -> Pairs:
    """The pairs whose values can be subtracted; the realism of a copy of a real image is infinite."""
    finite_pairs = []
    for first, other in pairs:
        first_value = first.values.get(name, math.nan)
        other_value = other.values.get(name, math.nan)
        if math.isfinite(first_value) and math.isfinite(other_value):
            finite_pairs.append((first, other))
    return finite_pairs


def _paired_interval(pairs: Pairs, name: str) -> Interval:
    """Interval of the mean change of a value from image to image of a pair."""
    changes = [other.values[name] - first.values[name] for first, other in pairs]
    return _interval_of_changes(torch.tensor(changes, dtype=torch.float64), pairs)


def _interval_of_changes(changes: Tensor, pairs: Pairs) -> Interval:
    over, clusters = _clusters(pairs)
    if clusters is None:
        return mean_interval(changes, over="paired images")
    return clustered_interval(changes, clusters, over=over)


def _clusters(pairs: Pairs) -> tuple[str, list | None]:
    """Groups of images that resemble each other: of one subject (the folder of their names) or one prompt.

    Returns:
        The name of the clusters, and the cluster of each pair; None where no two pairs share one.
    """
    folders = []
    prompts = []
    for first, _ in pairs:
        folders.append(first.name.rpartition("/")[0])
        prompts.append(first.prompt)
    if 2 <= len(set(folders)) < len(folders):
        return "folders of paired images", folders
    if 2 <= len(set(prompts)) < len(prompts):
        return "prompts of paired images", prompts
    return "", None


@dataclass(frozen=True)
class _PairedScore:
    """A score of two runs whose records kept their features, image by image in the same order.

    Attributes:
        metric: of the score.
        score: the first run's.
        options: of the metric.
        sides: the features of the first run's images and of the other's.
        real: the features of the reference; None for a metric without one.
        pairs: the images.
    """

    metric: Metric
    score: Score
    options: dict[str, object]
    sides: tuple[FeatureSet, FeatureSet]
    real: FeatureSet | None
    pairs: Pairs

    @classmethod
    def of(cls, first: ComparedRun, run: ComparedRun, score: Score, pairs: Pairs) -> _PairedScore | None:
        """None where a record kept no features, or the metric reads more than they hold."""
        metric = METRICS.get(score.metric)
        if metric is None or len(metric.generated) != 1 or metric.train:
            return None
        first_features = _stored_features(first, first.generated, score)
        other_features = _stored_features(run, run.generated, score)
        if first_features is None or other_features is None:
            return None
        real = _stored_features(first, "reference", score) if metric.real else None
        if metric.real and real is None:
            return None
        # with the options of the record, which may differ from today's defaults
        options = {}  # the identity also names the training images of a metric that reads some
        for name, value in score.identity["options"].items():
            if name in metric.options:
                options[name] = value
        return cls(metric, score, options, (first_features, other_features), real, pairs)

    def interval(self, change: float) -> Interval:
        """Interval of the difference of both scores, by the best method that there is for the metric.

        Args:
            change: the difference.

        Raises:
            ValueError: there are too few images.
        """
        over, clusters = _clusters(self.pairs)
        first, other = self.sides
        if self.metric.per_image is not None:  # the score is a mean over images
            first_values = self.metric.per_image(MetricCall(first, self.real, self.options))
            other_values = self.metric.per_image(MetricCall(other, self.real, self.options))
            return _interval_of_changes(other_values - first_values, self.pairs)
        if self.metric.key == "kid" and clusters is None:  # has a variance in closed form
            _, variance = paired_kid_difference(
                real=self.real["features"], first=first["features"], other=other["features"]
            )
            method = "normal, variance of the U-statistic of the pairs"
            return normal_interval(change, variance**0.5, method)
        k = self.options.get("k")  # of metrics with neighbours
        if k is not None and len(self.pairs) // 2 <= 2 * k:  # neighbours would be all over the half sample
            raise ValueError(f"halves of {len(self.pairs)} pairs are too few for {k} neighbours")
        return half_samples_interval(
            change, self._subset_change, len(self.pairs), clusters=clusters, over=over
        )

    def _subset_change(self, rows: Tensor) -> float:
        """The difference of the scores of some of the pairs."""
        first, other = self.sides
        return self._subset_score(other, rows) - self._subset_score(first, rows)

    def _subset_score(self, inputs: FeatureSet, rows: Tensor) -> float:
        """The score of some of a run's images, computed as the record says."""
        result = evaluate(
            self.metric.key,
            generated=inputs.rows(rows),
            real=self.real,
            seed=self.score.identity["seed"],
            intervals=False,
            floor=False,
            allow_small=True,
            metric_options=self.options,
        )
        # a metric with one score, of DreamBooth's protocol, leaves its name out of the identity
        name = self.score.identity.get("score", self.metric.scores[0])
        return result.values[name].value


def _stored_features(run: ComparedRun, label: str, score: Score) -> FeatureSet | None:
    """The features of a set that the record kept, in the role that the score's metric reads."""
    folder = run.record.sets[label].features if label in run.record.sets else None
    if folder is None or score.metric not in METRICS:
        return None
    path = run.path.parent / folder / file_name(score.identity["extractor"])
    if not path.is_file():
        return None
    role = METRICS[score.metric].generated[0]
    return FeatureSet({role: read_features(path).layers[score.identity["layer"]]})
