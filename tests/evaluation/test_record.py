"""The record of an evaluation: nothing is lost on the way through JSON, nothing damaged is read."""

import dataclasses
import json
import math

import pytest

from diffadapt.evaluation.record import (
    IDENTITY,
    EvaluationRecord,
    ExtractorSummary,
    ImageRow,
    Score,
    SetSummary,
    differences,
    read_record,
)
from diffadapt.metrics.intervals import Interval


def example() -> EvaluationRecord:
    identity = {**dict.fromkeys(IDENTITY), "metric": "fid", "layer": "pool", "options": {"k": 3}}
    score = Score(
        "fid", "fid", "a", 12.5, Interval(11.0, 14.0, "seeds"), {"generated": 3, "real": 4}, 1.0, "lower",
        identity, ("small",),
    )  # fmt: skip
    sets = {
        "a": SetSummary("generated", "out/a", "folder", 3, "f" * 64, {"PNG": 3}, skipped=("x.png: torn",)),
        "reference": SetSummary("real", "real", "zip", 4, "e" * 64),
    }
    rows = (ImageRow("a", "0.png", {"realism": 0.5}, "r.png", "reference", "a dog", 7),)
    extractor = ExtractorSummary("inception", "0" * 64, "tf1", 299, ("pool",))
    return EvaluationRecord(
        (score, dataclasses.replace(score, interval=None)), sets, (extractor,), images=rows
    )


def test_json_gives_back_an_equal_record(tmp_path):
    record = example()
    record.write(tmp_path / "out.json")
    assert read_record(tmp_path / "out.json") == record


def test_numbers_that_are_not_finite_are_strict_json_and_come_back(tmp_path):
    score = Score("fid", "fid", "a", float("nan"), Interval(-math.inf, math.inf, "none"), floor=math.inf)
    row = ImageRow("a", "copy.png", {"realism": math.inf})
    dataclasses.replace(example(), scores=(score,), images=(row,)).write(tmp_path / "out.json")
    stored = json.loads(
        (tmp_path / "out.json").read_text(encoding="utf-8")
    )  # NaN as a bare word would be read here
    assert stored["scores"][0]["value"] == "NaN"
    assert stored["images"][0]["values"] == {"realism": "Infinity"}
    made = read_record(tmp_path / "out.json")
    assert math.isnan(made.scores[0].value)
    assert made.scores[0].interval == score.interval
    assert made.scores[0].floor == math.inf
    assert made.images == (row,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("schema"), "not the JSON of an evaluation"),
        (lambda c: c.update(schema="other-1"), "evaluate again"),
        (lambda c: c["scores"][0].pop("value"), "damaged"),
        (lambda c: c["scores"][0].update(value="12.5"), "damaged"),
        (lambda c: c["sets"]["a"].update(colour="red"), "damaged"),
    ],
)
def test_foreign_and_damaged_records_are_refused(tmp_path, change, message):
    content = json.loads(example().to_json())
    change(content)
    (tmp_path / "x.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read_record(tmp_path / "x.json")
    assert "x.json" in str(caught.value)


def test_random_weights_and_demos_are_stamped():
    record = example()
    smoke = dataclasses.replace(record.extractors[0], smoke=True)
    assert record.stamp == ""
    assert dataclasses.replace(record, settings={"demo": True}).stamp == "DEMO"
    assert dataclasses.replace(record, extractors=(smoke,), settings={"demo": True}).stamp == "NOT A SCORE"


@pytest.mark.parametrize("name", IDENTITY)
def test_a_difference_of_identity_is_named(name):
    first = example().scores[0]
    second = dataclasses.replace(first, identity={**first.identity, name: "changed"})
    assert differences(first, first) == []
    (line,) = differences(first, second)
    assert line.startswith(f"{name}: ")
    assert "'changed'" in line
