"""Runs against a first one: differences of their scores and of their images' figures, or a refusal.

Images drawn with the same prompts and seeds are pairs: their differences vary less than the images do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffadapt.evaluation.feature_file import read_features
from diffadapt.evaluation.plots import Point
from diffadapt.evaluation.record import EvaluationRecord, ImageRow, Score, differences, read_record
from diffadapt.metrics.evaluate import evaluate
from diffadapt.metrics.inputs import Inputs
from diffadapt.metrics.intervals import (
    Interval,
    clustered_interval,
    half_samples_interval,
    mean_interval,
    normal_interval,
)
from diffadapt.metrics.registry import METRICS

COSTS = {  # key of run.json -> how it is called in a plot
    "parameters": "trained parameters",
    "seconds": "seconds of training",
    "peak_memory_bytes": "peak memory of training (bytes)",
}
Z = 1.959963984540054  # an interval's half-width in standard errors


@dataclass(frozen=True)
class Run:
    """One generated set of one record.

    Attributes:
        label: unique among the compared runs.
        path: of the record's JSON.
        generated: the set's label in the record.
        costs: what of COSTS is known of its training.
    """

    label: str
    path: Path
    record: EvaluationRecord
    generated: str
    costs: dict[str, float]

    @property
    def scores(self) -> dict[str, Score]:
        return {score.name: score for score in self.record.of(self.generated)}

    @property
    def rows(self) -> list[ImageRow]:
        return [row for row in self.record.images if row.generated == self.generated]


@dataclass(frozen=True)
class Difference:
    """`value` is the run's minus the first run's; paired: over the same prompts and seeds."""

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


def read_runs(paths: Sequence[Path], run_files: Sequence[Path] = ()) -> list[Run]:
    """Every generated set of every record, in order.

    Args:
        run_files: the run.json of each record, in order; else what the record knows of its adapters, or a
            run.json beside the record or the images.
    """
    if run_files and len(run_files) != len(paths):
        raise ValueError(f"{len(paths)} records, but {len(run_files)} of --run_json; give one for each")
    records = [read_record(path) for path in paths]
    everything = [(i, label) for i, record in enumerate(records) for label in record.labels]
    plain = [label for _, label in everything]
    runs = []
    for i, label in everything:
        path, unique = paths[i], plain.count(label) == 1
        name = label if unique else f"{path.parent.name}/{path.stem}: {label}"
        costs = _costs(records[i], label, path, run_files[i] if run_files else None)
        runs.append(Run(name, path, records[i], label, costs))
    if len({run.label for run in runs}) < len(runs):
        raise ValueError("two records of one name in folders of one name; rename one, their sets look alike")
    return runs


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
        names = dict.fromkeys(name for row, _ in pairs for name in row.values if name not in covered)
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


def points(runs: Sequence[Run], name: str, cost: str) -> list[Point]:
    """The runs of which score `name` and `cost` are known, for a Pareto plot."""
    found = []
    for run in runs:
        if name in run.scores and cost in run.costs:
            score = run.scores[name]
            ends = (None, None) if score.interval is None else (score.interval.low, score.interval.high)
            found.append(Point(run.label, run.costs[cost], score.value, *ends))
    return found


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
        return Difference(**known, interval=_paired_interval(pairs, a.metric, value), paired=True)
    if complete and (of_rows := _from_features(first, run, a)) is not None:
        return Difference(**known, interval=half_samples_interval(value, of_rows, len(pairs)), paired=True)
    if a.interval is None or b.interval is None:
        return Difference(**known, interval=None, paired=False)
    error = math.hypot(*((own.high - own.low) / (2 * Z) for own in (a.interval, b.interval)))
    method = "normal, both intervals' widths as of independent sets"
    return Difference(**known, interval=normal_interval(value, error, method), paired=False)


def _figure_difference(label: str, name: str, pairs: list) -> Difference:
    pairs = [pair for pair in pairs if all(name in row.values for row in pair)]
    means = [sum(row.values[name] for row in side) / len(pairs) for side in zip(*pairs, strict=True)]
    value = means[1] - means[0]
    interval = _paired_interval(pairs, name, value) if len(pairs) > 1 else None
    return Difference(f"{name} of each image", label, *means, value, interval, True, "")


def _paired_interval(pairs: list, name: str, value: float) -> Interval:
    """Over prompts where several images share one: images of one prompt resemble each other."""
    changes = torch.tensor([b.values[name] - a.values[name] for a, b in pairs], dtype=torch.float64)
    prompts = [row.prompt for row, _ in pairs]
    if 2 <= len(set(prompts)) < len(prompts):
        return clustered_interval(changes, prompts, over="prompts of paired images")
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
    name = f"{score.identity['extractor'].replace('/', '_').replace(':', '-')}.safetensors"
    path = run.path.parent / folder / name
    if not path.is_file():
        return None
    return Inputs({METRICS[score.metric].generated[0]: read_features(path).layers[score.identity["layer"]]})


def _costs(record: EvaluationRecord, label: str, path: Path, run_file: Path | None) -> dict[str, float]:
    own = record.sets[label]
    found = own.made.get("run") or {}
    source = Path(own.source)
    beside = [path.parent / "run.json", source / "run.json", source.parent / "run.json"]
    for candidate in [run_file] if run_file is not None else beside if not found else []:
        if run_file is not None or candidate.is_file():
            try:
                found = json.loads(candidate.read_text())
            except ValueError as error:
                raise ValueError(f"{candidate} is not the run.json of a training run ({error})") from None
            break
    return {name: float(found[name]) for name in COSTS if isinstance(found.get(name), int | float)}
