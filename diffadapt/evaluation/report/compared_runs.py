"""The runs of a comparison: the generated sets of several records, with the cost of their training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffadapt.evaluation.record import EvaluationRecord, ImageRow, Score, read_record
from diffadapt.evaluation.report.plots import ParetoPoint

COSTS = {  # key of run.json -> axis label of a plot
    "parameters": "trained parameters",
    "seconds": "seconds of training",
    "peak_memory_bytes": "peak memory of training (bytes)",
}


@dataclass(frozen=True)
class ComparedRun:
    """One generated set of one record.

    Attributes:
        label: unique among the compared runs.
        path: of the record's JSON.
        record: the evaluation.
        generated: the set's label in the record.
        costs: those of COSTS that are known of its training.
    """

    label: str
    path: Path
    record: EvaluationRecord
    generated: str
    costs: dict[str, float]

    @property
    def scores(self) -> dict[str, Score]:
        """The set's scores by name."""
        return {score.name: score for score in self.record.of(self.generated)}

    @property
    def rows(self) -> list[ImageRow]:
        """The values of the set's images."""
        return [row for row in self.record.images if row.generated == self.generated]


def read_runs(paths: Sequence[Path], run_files: Sequence[Path] = ()) -> list[ComparedRun]:
    """Every generated set of every record, in order.

    Args:
        paths: JSON files of records.
        run_files: the run.json of each record, in the same order; without them costs come from the record,
            if it generated the images from an adapter, or from a run.json beside the record or the images.

    Raises:
        ValueError: the numbers of files differ, or two runs cannot be told apart.
    """
    if run_files and len(run_files) != len(paths):
        raise ValueError(f"{len(paths)} records, but {len(run_files)} of --run_json; give one for each")
    records = [read_record(path) for path in paths]
    all_labels: list[str] = []
    for record in records:
        all_labels += record.labels
    runs = []
    for index, (path, record) in enumerate(zip(paths, records, strict=True)):
        run_file = run_files[index] if run_files else None
        for generated in record.labels:
            # two records may both have a set "base"
            is_unique = all_labels.count(generated) == 1
            label = generated if is_unique else f"{path.parent.name}/{path.stem}: {generated}"
            costs = _training_costs(record, generated, path, run_file)
            runs.append(ComparedRun(label, path, record, generated, costs))
    if len({run.label for run in runs}) < len(runs):  # the names of files and folders are not enough
        raise ValueError("two records of one name in folders of one name; rename one, their sets look alike")
    return runs


def pareto_points(runs: Sequence[ComparedRun], name: str, cost: str) -> list[ParetoPoint]:
    """The runs of which the score `name` and the cost `cost` are known, for a Pareto plot."""
    points = []
    for run in runs:
        if name not in run.scores or cost not in run.costs:
            continue
        score = run.scores[name]
        low = None if score.interval is None else score.interval.low
        high = None if score.interval is None else score.interval.high
        points.append(ParetoPoint(run.label, run.costs[cost], score.value, low, high))
    return points


def _training_costs(
    record: EvaluationRecord, generated: str, path: Path, run_file: Path | None
) -> dict[str, float]:
    """The costs in `run_file`, else in the record, else in a run.json beside the record or the images."""
    summary = record.sets[generated]
    if run_file is not None:
        values = _read_run_file(run_file)
    elif summary.made.get("run"):
        values = summary.made["run"]
    else:
        source = Path(summary.source)
        values = {}
        for folder in (path.parent, source, source.parent):
            if (folder / "run.json").is_file():
                values = _read_run_file(folder / "run.json")
                break
    costs = {}
    for name in COSTS:
        if isinstance(values.get(name), int | float):
            costs[name] = float(values[name])
    return costs


def _read_run_file(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not the run.json of a training run ({error})") from None
