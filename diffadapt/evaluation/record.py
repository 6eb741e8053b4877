"""The record of an evaluation: the sets, the settings and the scores, in one JSON file.

Each score carries what a reader needs to judge it, or to refuse to compare it with another. The page, the
tables and `eval/compare.py` are made from this record alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from diffadapt.common.atomic_files import write_utf8
from diffadapt.common.strict_json import parse_number, to_json
from diffadapt.metrics.intervals import Interval

SCHEMA = "diffadapt-evaluation-1"  # the fields below are its keys, so a name that changes is another schema
NOT_A_SCORE = "NOT A SCORE"  # stamp of everything computed with random weights
IDENTITY = (  # fields that two scores must share to be compared, in the order in which differences are named
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
        name: the name that the number may carry: "fid", or "frechet_distance[embedded:clip]".
        metric: its key in the registry of metrics: "fid".
        generated: label of the scored set, a key of `EvaluationRecord.sets`.
        value: finite; scores that could not be computed are in `EvaluationRecord.refused`.
        interval: 95 % interval with its method, None where there is none.
        n: images used, {"generated": 500, "real": 500}.
        floor: the same metric between two disjoint halves of the real set (its ceiling, where higher is
            better); None where the metric has none or the set is too small to halve.
        better: "lower", "higher", or "" where neither is.
        identity: the fields of IDENTITY; None where a field does not apply.
        notes: limits of the number, such as "below the minimum of 4096 images: not comparable".
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
    """Information about one image set.

    Attributes:
        role: "generated" or "real".
        source: its name on the command line.
        kind: folder, zip, datasets, npz, features, statistics, embedded, adapter or base.
        count: images scored.
        fingerprint: SHA-256 over the sorted hashes of its images.
        formats: numbers of images by format ("PNG", ...).
        sizes: numbers of images by size ("64x64", ...).
        modes: numbers of images by mode ("RGB", ...).
        conversions: numbers of images that are "transparent, put on white", ...; other programs may read
            other pixels of them.
        skipped: unreadable files that were left out, "name: reason".
        made: how images were generated: adapter, sampler, prompts, seeds and the adapter's run.json
            (`made["run"]["parameters"]`, `["seconds"]`, `["peak_memory_bytes"]`); empty for existing images.
        features: folder of the set's features, relative to the JSON file; None where they were not saved.
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
    """Information about one extractor.

    Attributes:
        name: full name.
        sha256: of the weights.
        preset: of the resize.
        side: height and width that the network takes, in pixels.
        layers: those that were computed.
        dtype: of the network.
        smoke: whether the weights are random, in which case nothing is a score.
    """

    name: str
    sha256: str
    preset: str
    side: int
    layers: tuple[str, ...]
    dtype: str = "float32"
    smoke: bool = False


@dataclass(frozen=True)
class ImageRow:
    """Values of one generated image: a row of the CSV.

    Attributes:
        generated: label of its set.
        name: of the file.
        values: such as "realism", "nearest_similarity", "clip_t"; higher is better in each of RANKING. The
            realism of a copy of a real image is infinite.
        nearest: name of the most similar real image.
        nearest_in: label of the set of that image.
        prompt: of the image, where it is known.
        seed: of the image, where it is known.
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
    """The result of one evaluation.

    Attributes:
        scores: of all sets.
        sets: label -> the generated sets and the reference.
        extractors: networks that were used.
        seeds: by purpose.
        versions: of libraries.
        warnings: about sets.
        images: values of each generated image.
        refused: "set: metric" of scores that were not computed -> why.
        settings: command, protocol, device, seconds, ...
        schema: version of the JSON.
    """

    scores: tuple[Score, ...]
    sets: Mapping[str, SetSummary]
    extractors: tuple[ExtractorSummary, ...]
    seeds: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    images: tuple[ImageRow, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
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
        """Writes the JSON file atomically."""
        write_utf8(path, self.to_json())

    @classmethod
    def from_json(cls, text: str) -> EvaluationRecord:
        """The record in a JSON text.

        Raises:
            ValueError: the text is no record, or of another schema.
        """
        try:
            content = json.loads(text)
            schema = content.pop("schema")
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"not the JSON of an evaluation ({error})") from None
        if schema != SCHEMA:  # before anything else is read, which would fail with a worse message
            raise ValueError(f"the record follows {schema!r}, this version reads {SCHEMA!r}; evaluate again")
        try:
            # what is a dataclass here is a dictionary in JSON; all other fields are plain values
            scores = [_score(values) for values in content.pop("scores")]
            sets = {label: _build(SetSummary, values) for label, values in content.pop("sets").items()}
            extractors = [_build(ExtractorSummary, values) for values in content.pop("extractors")]
            images = [_image_row(values) for values in content.pop("images")]
            return cls(
                scores=tuple(scores),
                sets=sets,
                extractors=tuple(extractors),
                images=tuple(images),
                **_restore_tuples(EvaluationRecord, content),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"the record of the evaluation is damaged: {error}") from None


def read_record(path: str | Path) -> EvaluationRecord:
    """The record in a file.

    Raises:
        ValueError: the file holds no record; names the file.
    """
    try:
        return EvaluationRecord.from_json(Path(path).read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None


def differences(first: Score, second: Score) -> list[str]:
    """Why two scores must not be compared: a line for each field of their identities that differs."""
    lines = []
    for name in IDENTITY:
        first_value = first.identity.get(name)
        second_value = second.identity.get(name)
        if first_value != second_value:
            lines.append(f"{name}: {first_value!r} against {second_value!r}")
    return lines


def _score(values: dict) -> Score:
    """A score from JSON, in which NaN and infinity are words."""
    interval = values.pop("interval")
    if interval is not None:
        interval = Interval(parse_number(interval["low"]), parse_number(interval["high"]), interval["method"])
    numbers = {"value": parse_number(values["value"]), "floor": parse_number(values["floor"])}
    return _build(Score, {**values, **numbers, "interval": interval})


def _image_row(values: dict) -> ImageRow:
    image_values = {name: parse_number(value) for name, value in values["values"].items()}
    return _build(ImageRow, {**values, "values": image_values})


def _build(record_class: type, values: dict) -> object:
    return record_class(**_restore_tuples(record_class, values))


def _restore_tuples(record_class: type, values: dict) -> dict:
    """Turns the lists of JSON into tuples again, for the fields that are tuples."""
    type_of = {field.name: str(field.type) for field in fields(record_class)}  # annotations are text
    restored = {}
    for name, value in values.items():
        is_tuple = type_of.get(name, "").startswith("tuple")
        restored[name] = tuple(value) if is_tuple else value
    return restored
