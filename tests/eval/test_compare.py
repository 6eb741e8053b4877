"""eval/compare.py: differences, their intervals, costs, and what is refused."""

import json
from dataclasses import replace

import compare as script
import pytest
import torch
from helpers.example_records import IDENTITY, record

from diffadapt.evaluation.features.feature_file import SetFeatures, write_features
from diffadapt.evaluation.report.compared_runs import pareto_points, read_runs
from diffadapt.evaluation.report.comparison import Difference, compare, paired_rows
from diffadapt.evaluation.sets.image_files import ImageInfo
from diffadapt.metrics.intervals import Interval, mean_interval

NAME = "kernel_distance[embedded:clip]"


def written(path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    made = record(**options)
    made.write(path)
    return path


def by_name(differences, label=None):
    return {d.name: d for d in differences if label in (None, d.label)}


def test_differences_of_independent_sets_join_both_intervals(tmp_path):
    runs = read_runs([written(tmp_path / "all.json", labels=("a", "b"))])
    own = by_name(compare(runs))[NAME]
    assert own.value == pytest.approx(0.01)
    assert not own.paired
    assert own.interval.high - own.value == pytest.approx(0.01 * 2**0.5)
    assert own.verdict == "no clear difference"


def test_figures_of_images_are_compared_pair_by_pair(tmp_path):
    """All pairs differ by the same amount: that is no reason to be sure, though the images vary widely."""
    first = written(tmp_path / "a.json", labels=("a",))
    runs = read_runs([first, written(tmp_path / "b.json", labels=("b",), shift=0.1)])
    own = by_name(compare(runs))["realism of each image"]
    assert own.paired
    assert own.value == pytest.approx(0.1)
    assert (own.interval, own.verdict) == (None, "no interval")
    assert "the difference was the same in all parts" in own.note
    changed = record(("b",), shift=0.1)
    values = torch.arange(30, dtype=torch.float64) / 100
    rows = [
        replace(row, values={"realism": row.values["realism"] + v.item()})
        for row, v in zip(changed.images, values, strict=True)
    ]
    replace(changed, images=tuple(rows)).write(tmp_path / "c.json")
    own = by_name(compare(read_runs([first, tmp_path / "c.json"])))["realism of each image"]
    expected = mean_interval(values + 0.1)
    assert (own.interval.low, own.interval.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_printed_table_fits_a_terminal_and_says_each_note_once(tmp_path, capsys):
    files = [written(tmp_path / "all.json", labels=("a", "a-run-of-a-long-name", "c", "d"))]
    assert script.main([*map(str, files), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if "with plots" not in line) <= 110
    assert "extractor: embedded:clip" in printed
    assert printed.count("as of independent sets") == 1
    assert NAME in (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")


def test_a_score_that_is_the_mean_of_its_images_gets_the_paired_interval(tmp_path):
    for label, shift in (("a", 0.0), ("b", 0.05)):
        made = record((label,), shift=shift)
        rows = [
            replace(row, values={"realism": row.values["realism"] + shift * (number % 2 - 0.5) / 50})
            for number, row in enumerate(made.images)
        ]
        made = replace(made, images=tuple(rows))
        mean = sum(row.values["realism"] for row in made.images) / len(made.images)
        score = replace(made.scores[0], metric="realism", name="realism", value=mean, better="higher")
        replace(made, scores=(score,)).write(tmp_path / f"{label}.json")
    own = by_name(compare(read_runs([tmp_path / "a.json", tmp_path / "b.json"])))["realism"]
    assert own.paired
    assert own.value == pytest.approx(0.05)
    assert 0 < own.interval.high - own.interval.low < 1e-3
    assert own.verdict == "better"


def test_images_are_paired_by_prompt_and_seed_and_only_where_that_is_known():
    first, other = list(record(("a",)).images), list(record(("b",)).images)
    assert len(paired_rows(first, other[::-1])) == 30
    assert all(a.seed == b.seed for a, b in paired_rows(first, other[::-1]))
    assert paired_rows(first, [replace(row, seed=None) for row in other]) == []
    assert paired_rows(first, [replace(row, seed=0, prompt="x") for row in other]) == []  # not unique
    assert len(paired_rows(first, other[:12])) == 12


@pytest.mark.parametrize(
    ("field", "value"),
    [("extractor_sha256", "ff" * 32), ("preset", "clean"), ("layer", "pool"), ("options", {"k": 5}),
     ("n_generated", 31), ("reference", "00" * 32), ("metric_version", "2")],
)  # fmt: skip
def test_runs_of_another_identity_are_refused_by_the_name_of_the_field(tmp_path, field, value, capsys):
    paths = [
        written(tmp_path / "a.json", labels=("a",)),
        written(tmp_path / "b.json", labels=("b",), **{field: value}),
    ]
    with pytest.raises(ValueError, match=f"of a and of b cannot be compared: {field}: "):
        script.main([*map(str, paths), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_records_without_a_common_score_or_a_second_set_are_refused(tmp_path):
    made = record(("b",))
    replace(made, scores=(replace(made.scores[0], name="fid"),)).write(tmp_path / "b.json")
    first = written(tmp_path / "a.json", labels=("a",))
    with pytest.raises(ValueError, match="no score in common"):
        compare(read_runs([first, tmp_path / "b.json"]))
    with pytest.raises(ValueError, match="needs two generated sets, got 1"):
        compare(read_runs([first]))


def test_a_run_is_better_or_worse_only_when_its_interval_leaves_0_out():
    def verdict(low, high, better):
        value = (low + high) / 2
        return Difference("x", "b", 0, value, value, Interval(low, high, ""), True, better).verdict

    assert verdict(0.1, 0.2, "higher") == verdict(-0.2, -0.1, "lower") == "better"
    assert verdict(0.1, 0.2, "lower") == verdict(-0.2, -0.1, "higher") == "worse"
    assert verdict(-0.1, 0.2, "higher") == "no clear difference"
    assert verdict(0.1, 0.2, "") == "differs"


@pytest.mark.parametrize(
    ("metric", "method"), [("kid", "U-statistic of the pairs"), ("vendi", "20 random halves")]
)
def test_kept_features_give_distances_between_sets_a_paired_interval(tmp_path, metric, method):
    """Sets that differ little on the same seeds: pairing narrows the interval of the difference."""
    own = difference_of(tmp_path, metric, count=60)
    assert own.paired
    assert method in own.interval.method
    assert 0 < own.interval.high - own.interval.low < 2**0.5


def test_pairs_of_few_prompts_are_compared_prompt_by_prompt(tmp_path):
    """Ten images of each prompt are not ten independent ones."""
    own = difference_of(tmp_path, "clip_i", count=60, prompts=6)
    assert own.interval.method == "Student's t, standard error over 6 prompts of paired images"
    for metric in ("vendi", "kid"):
        own = difference_of(tmp_path, metric, count=60, prompts=6)
        assert own.interval.method == "Student's t, spread of 20 random halves of 6 prompts of paired images"


def test_neighbours_among_halves_of_few_pairs_give_no_verdict(tmp_path):
    """With 12 pairs and k = 5 every ball of a half holds every image, so that nothing varies."""
    for score, metric in (("density", "density_coverage"), ("precision", "precision_recall")):
        own = difference_of(tmp_path, metric, count=12, score=score, options={"k": 5})
        assert (own.interval, own.verdict) == (None, "no interval")
        assert own.note == "no interval: halves of 12 pairs are too few for 5 neighbours"
    own = difference_of(tmp_path, "msid", count=12, options={"k": 5})
    assert own.interval is None


def difference_of(tmp_path, metric, *, count, prompts=None, score=None, options=None):
    """The difference of two sets whose features are kept, 0.3 apart."""
    generator = torch.Generator().manual_seed(0)
    shared, real = (torch.randn(count, 4, generator=generator) for _ in range(2))
    sets = {"a": shared, "b": shared + 0.3, "reference": real}
    identity = {**IDENTITY, "metric": metric, "n_generated": count, "n_real": count, "score": score or metric}
    identity["options"] = options or {}
    for label, rows in sets.items():
        facts = tuple(ImageInfo(f"{i}", "", "", "", 0, 0, "PNG", "RGB", 8, 8) for i in range(count))
        write_features(
            tmp_path / "features" / label / "embedded-clip.safetensors",
            SetFeatures(identity, {"image": rows}, facts),
        )
    made = record(("a", "b"), count=count, **identity)
    if prompts is not None:
        rows = [replace(row, prompt=f"{row.seed % prompts}") for row in made.images]
        made = replace(made, images=tuple(rows))
    kept = {label: replace(own, features=f"features/{label}") for label, own in made.sets.items()}
    scores = tuple(
        replace(s, metric=metric, interval=Interval(s.value - 0.5, s.value + 0.5, "normal"))
        for s in made.scores
    )
    replace(made, sets=kept, scores=scores).write(tmp_path / "all.json")
    return by_name(compare(read_runs([tmp_path / "all.json"])))[NAME]


def test_costs_come_from_the_record_from_beside_it_or_from_the_given_file(tmp_path):
    path = written(tmp_path / "all.json", labels=("a", "b"))
    runs = read_runs([path])
    assert [run.costs["parameters"] for run in runs] == [1000, 2000]
    assert [(p.cost, p.value) for p in pareto_points(runs, NAME, "seconds")] == [(60, 0.02), (59, 0.03)]
    bare = record(("c",))
    sets = {label: replace(own, made={}) for label, own in bare.sets.items()}
    replace(bare, sets=sets).write(tmp_path / "c" / "evaluation.json")
    assert pareto_points(read_runs([tmp_path / "c" / "evaluation.json"]), NAME, "seconds") == []
    (tmp_path / "c" / "run.json").write_text(
        json.dumps({"parameters": 5, "seconds": 7.5, "method": "lora"}), encoding="utf-8"
    )
    assert read_runs([tmp_path / "c" / "evaluation.json"])[0].costs == {"parameters": 5, "seconds": 7.5}
    (tmp_path / "given.json").write_text(json.dumps({"parameters": 9}), encoding="utf-8")
    assert read_runs([path], [tmp_path / "given.json"])[0].costs == {"parameters": 9}
    with pytest.raises(ValueError, match="1 records, but 2 of --run_json"):
        read_runs([path], [tmp_path / "given.json"] * 2)


def test_the_script_writes_table_json_and_a_page_with_plots(tmp_path, capsys):
    path = written(tmp_path / "all.json", labels=("a", "b", "c"))
    assert script.main([str(path), "--first", "b", "--output", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert content["first"] == "b"
    assert {d["label"] for d in content["differences"]} == {"a", "c"}
    html = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert html.count("data:image/svg+xml") == 3  # parameters, seconds, memory
    assert "DEMO" in html
    printed = capsys.readouterr().out
    assert "**DEMO**" in printed
    assert "exclude 0 by chance alone" in printed
    assert "| kernel_distance | a | 0.03 | 0.02 | -0.01 |" in " ".join(printed.split())
    written_table = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    assert f"| {NAME} | a | 0.03 | 0.02 | -0.01 |" in " ".join(written_table.split())
    with pytest.raises(ValueError, match="'d' is none of the runs a, b, c"):
        script.main([str(path), "--first", "d"])


def test_a_folder_that_cannot_be_written_is_told_first(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        script.main([str(tmp_path / "nowhere.json"), "--output", str(tmp_path / "file")])
