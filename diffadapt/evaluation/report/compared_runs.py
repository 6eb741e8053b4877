"""The runs of a comparison: the generated sets of several records, with what their training cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffadapt.evaluation.record import EvaluationRecord, ImageRow, Score, read_record
from diffadapt.evaluation.report.plots import Point

COSTS = {  # key of run.json -> how it is called in a plot
    "parameters": "trained parameters",
    "seconds": "seconds of training",
    "peak_memory_bytes": "peak memory of training (bytes)",
}


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


def points(runs: Sequence[Run], name: str, cost: str) -> list[Point]:
    """The runs of which score `name` and `cost` are known, for a Pareto plot."""
    found = []
    for run in runs:
        if name in run.scores and cost in run.costs:
            score = run.scores[name]
            ends = (None, None) if score.interval is None else (score.interval.low, score.interval.high)
            found.append(Point(run.label, run.costs[cost], score.value, *ends))
    return found


def _costs(record: EvaluationRecord, label: str, path: Path, run_file: Path | None) -> dict[str, float]:
    own = record.sets[label]
    found = own.made.get("run") or {}
    source = Path(own.source)
    beside = [path.parent / "run.json", source / "run.json", source.parent / "run.json"]
    for candidate in [run_file] if run_file is not None else beside if not found else []:
        if run_file is not None or candidate.is_file():
            try:
                found = json.loads(candidate.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{candidate} is not the run.json of a training run ({error})") from None
            break
    return {name: float(found[name]) for name in COSTS if isinstance(found.get(name), int | float)}
