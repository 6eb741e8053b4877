"""The record of an evaluation: what was scored, how, with what outcome; one JSON file.

Everything a reader needs to judge a number, or to refuse to compare it with another, stands beside it. The
page, the tables and `eval/compare.py` are made from this record alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from diffadapt.common.atomic_files import write_atomically
from diffadapt.common.strict_json import parse_number, to_json
from diffadapt.metrics.intervals import Interval

SCHEMA = "diffadapt-evaluation-1"
NOT_A_SCORE = "NOT A SCORE"  # stamped on everything made with random weights
IDENTITY = (  # what two scores must share to be compared, in the order in which a difference is named
    "metric",
    "score",
    "metric_version",
    "extractor",
    "extractor_sha256",
    "preset",
    "layer",
    "reference",
    "options",
    "n_generated",
    "n_real",
    "seed",
)


@dataclass(frozen=True)
class Score:
    """One number of one generated set.

    Attributes:
        name: what the number may be called: "fid", or "frechet_distance[embedded:clip]".
        metric: its key in the registry of metrics: "fid".
        generated: label of the scored set, a key of `EvaluationRecord.sets`.
        value: finite; what could not be computed stands in `EvaluationRecord.refused`.
        interval: 95 % interval with its method, None where there is none.
        n: images used, {"generated": 500, "real": 500}.
        floor: the same metric between two disjoint halves of the real set (its ceiling, where higher is
            better); None where the metric has none or the set is too small to halve.
        better: "lower", "higher", or "" where neither is.
        identity: the fields of IDENTITY; None where a field does not apply.
        notes: what limits the number, such as "below the minimum of 4096 images: not comparable".
    """

    name: str
    metric: str
    generated: str
    value: float
    interval: Interval | None = None
    n: Mapping[str, int] = field(default_factory=dict)
    floor: float | None = None
    better: str = ""
    identity: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SetSummary:
    """What is known of one image set.

    Attributes:
        role: "generated" or "real".
        source: as it was named on the command line.
        kind: folder, zip, datasets, npz, features, statistics, embedded, adapter or base.
        count: images scored.
        fingerprint: SHA-256 over the sorted hashes of its images.
        formats, sizes, modes: how many images are "PNG", "64x64", "RGB".
        conversions: how many images are "transparent, put on white", ...; other programs may read those
            otherwise.
        skipped: unreadable files left out, "name: reason".
        made: of drawn images, how: adapter, sampler, prompts, seeds and the adapter's run.json
            (`made["run"]["parameters"]`, `["seconds"]`, `["peak_memory_bytes"]`); empty for given files.
        features: folder, relative to the JSON file, with the set's features, when they were kept.
    """

    role: str
    source: str
    kind: str
    count: int
    fingerprint: str
    formats: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    modes: Mapping[str, int] = field(default_factory=dict)
    conversions: Mapping[str, int] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    made: Mapping[str, object] = field(default_factory=dict)
    features: str | None = None


@dataclass(frozen=True)
class ExtractorSummary:
    """What turned images into features."""

    name: str
    sha256: str  # of the weights
    preset: str  # of the resize
    side: int  # pixels
    layers: tuple[str, ...]  # those that were used
    dtype: str = "float32"
    smoke: bool = False  # random weights: nothing is a score


@dataclass(frozen=True)
class ImageRow:
    """Figures of one generated image: the rows of the CSV, the order of the contact sheets.

    Attributes:
        generated: label of its set.
        name: file name, or the drawn image's number and seed.
        values: such as "realism", "nearest_similarity", "clip_t"; higher is better in each of RANKING. The
            realism of a copy of a real image is infinite.
        nearest: name of the most similar real image, in the set `nearest_in`.
    """

    generated: str
    name: str
    values: Mapping[str, float] = field(default_factory=dict)
    nearest: str | None = None
    nearest_in: str | None = None
    prompt: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class EvaluationRecord:
    """One call's result. `refused` names metrics that were not computed, "set: metric" -> why."""

    scores: tuple[Score, ...]
    sets: Mapping[str, SetSummary]
    extractors: tuple[ExtractorSummary, ...]
    seeds: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    images: tuple[ImageRow, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)  # command, protocol, device, seconds, ...
    schema: str = SCHEMA

    @property
    def stamp(self) -> str:
        """NOT A SCORE when an extractor had random weights, DEMO on embedded images, else ""."""
        if any(extractor.smoke for extractor in self.extractors):
            return NOT_A_SCORE
        return "DEMO" if self.settings.get("demo") else ""

    @property
    def labels(self) -> list[str]:
        """The generated sets in the order in which they were named."""
        return [label for label, summary in self.sets.items() if summary.role == "generated"]

    def of(self, label: str) -> list[Score]:
        """The scores of one generated set."""
        return [score for score in self.scores if score.generated == label]

    def to_json(self) -> str:
        """Strict JSON (`diffadapt.common.strict_json`), keys in the order of the fields."""
        return to_json(asdict(self))

    def write(self, path: str | Path) -> None:
        text = self.to_json()
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    @classmethod
    def from_json(cls, text: str) -> EvaluationRecord:
        """Raises: ValueError when the text is no record, or of another schema."""
        try:
            content = json.loads(text)
            schema = content.pop("schema")
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"not the JSON of an evaluation ({error})") from None
        if schema != SCHEMA:
            raise ValueError(f"the record follows {schema!r}, this version reads {SCHEMA!r}; evaluate again")
        try:
            return cls(
                scores=tuple(_score(values) for values in content.pop("scores")),
                sets={label: _built(SetSummary, values) for label, values in content.pop("sets").items()},
                extractors=tuple(_built(ExtractorSummary, e) for e in content.pop("extractors")),
                images=tuple(_image_row(values) for values in content.pop("images")),
                **_tuples(EvaluationRecord, content),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"the record of the evaluation is damaged: {error}") from None


def read_record(path: str | Path) -> EvaluationRecord:
    """The record in a file; errors name the file."""
    try:
        return EvaluationRecord.from_json(Path(path).read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None


def differences(first: Score, second: Score) -> list[str]:
    """Why two scores must not be compared: a line for each field of their identities that differs."""
    return [
        f"{name}: {first.identity.get(name)!r} against {second.identity.get(name)!r}"
        for name in IDENTITY
        if first.identity.get(name) != second.identity.get(name)
    ]


def _score(values: dict) -> Score:
    interval = values.pop("interval")
    if interval is not None:
        interval = Interval(parse_number(interval["low"]), parse_number(interval["high"]), interval["method"])
    numbers = {name: parse_number(values[name]) for name in ("value", "floor")}
    return _built(Score, {**values, **numbers, "interval": interval})


def _image_row(values: dict) -> ImageRow:
    figures = {name: parse_number(value) for name, value in values["values"].items()}
    return _built(ImageRow, {**values, "values": figures})


def _built(kind: type, values: dict) -> object:
    return kind(**_tuples(kind, values))


def _tuples(kind: type, values: dict) -> dict:
    """JSON knows lists only: fields that are tuples become tuples again."""
    names = {f.name for f in fields(kind) if str(f.type).startswith("tuple")}
    return {name: tuple(value) if name in names else value for name, value in values.items()}
