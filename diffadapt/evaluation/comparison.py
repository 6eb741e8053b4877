"""Runs against a first one: differences of their scores and of their images' figures, or a refusal.

Images drawn with the same prompts and seeds are pairs: their differences vary less than the images do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.evaluation.compared_runs import Run
from diffadapt.evaluation.feature_file import file_name, read_features
from diffadapt.evaluation.record import ImageRow, Score, differences
from diffadapt.metrics.evaluate import evaluate
from diffadapt.metrics.inputs import Inputs
from diffadapt.metrics.intervals import (
    Interval,
    Z,
    clustered_interval,
    half_samples_interval,
    mean_interval,
    normal_interval,
)
from diffadapt.metrics.registry import METRICS


@dataclass(frozen=True)
class Difference:
    """`value`: the run's minus the first run's; paired: over the same prompts and seeds."""

    name: str
    label: str
    first: float
    other: float
    value: float
    interval: Interval | None
    paired: bool
    better: str

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
    a, b = first.scores[name], run.scores[name]
    value, known = b.value - a.value, {"name": name, "label": run.label, "better": a.better}
    known |= {"first": a.value, "other": b.value, "value": value}
    complete = len(pairs) == len(first.rows) == len(run.rows)
    if complete and len(pairs) > 1 and all(a.metric in row.values for pair in pairs for row in pair):
        return Difference(**known, interval=_paired_interval(pairs, a.metric), paired=True)
    if complete and (of_rows := _from_features(first, run, a)) is not None:
        return Difference(**known, interval=half_samples_interval(value, of_rows, len(pairs)), paired=True)
    if a.interval is None or b.interval is None:
        return Difference(**known, interval=None, paired=False)
    error = math.hypot(*((own.high - own.low) / (2 * Z) for own in (a.interval, b.interval)))
    method = "normal, both intervals' widths as of independent sets"
    return Difference(**known, interval=normal_interval(value, error, method), paired=False)


def _figure_difference(label: str, name: str, pairs: list) -> Difference:
    pairs = _finite_pairs(pairs, name)
    means = [sum(row.values[name] for row in side) / len(pairs) for side in zip(*pairs, strict=True)]
    value = means[1] - means[0]
    interval = _paired_interval(pairs, name) if len(pairs) > 1 else None
    return Difference(f"{name} of each image", label, *means, value, interval, True, "")


def _finite_pairs(pairs: list, name: str) -> list:
    """The pairs of which a figure can be subtracted; the realism of a copy of a real image is infinite."""
    return [pair for pair in pairs if all(math.isfinite(row.values.get(name, math.nan)) for row in pair)]


def _paired_interval(pairs: list, name: str) -> Interval:
    """Images of one subject (the folder of their names), or else of one prompt, resemble each other."""
    changes = torch.tensor([b.values[name] - a.values[name] for a, b in pairs], dtype=torch.float64)
    groups = {
        "folders of paired images": [row.name.rpartition("/")[0] for row, _ in pairs],
        "prompts of paired images": [row.prompt for row, _ in pairs],
    }
    for over, clusters in groups.items():
        if 2 <= len(set(clusters)) < len(clusters):
            return clustered_interval(changes, clusters, over=over)
    return mean_interval(changes, over="paired images")


def _from_features(first: Run, run: Run, score: Score) -> Callable[[Tensor], float] | None:
    """A score's difference on some of the paired images, where both records kept their features."""
    metric = METRICS.get(score.metric)
    labels = {"real": "reference"} if metric and metric.real else {}
    read = [_features(owner, owner.generated, score) for owner in (first, run)]
    real = {role: _features(first, label, score) for role, label in labels.items()}
    if metric is None or len(metric.generated) != 1 or None in [*read, *real.values()]:
        return None
    options = {name: value for name, value in score.identity["options"].items() if name in metric.options}
    place = metric.scores.index(score.identity.get("score", metric.scores[0]))

    def of_rows(rows: Tensor) -> float:
        quick = {"intervals": False, "floor": False, "allow_small": True, "seed": score.identity["seed"]}
        made = [
            evaluate(metric.key, generated=own.rows(rows), **real, **quick, **options).values for own in read
        ]
        values = [list(own.values())[place].value for own in made]
        return values[1] - values[0]

    return of_rows


def _features(run: Run, label: str, score: Score) -> Inputs | None:
    folder = run.record.sets[label].features if label in run.record.sets else None
    if folder is None or score.metric not in METRICS:
        return None
    path = run.path.parent / folder / file_name(score.identity["extractor"])
    if not path.is_file():
        return None
    return Inputs({METRICS[score.metric].generated[0]: read_features(path).layers[score.identity["layer"]]})
