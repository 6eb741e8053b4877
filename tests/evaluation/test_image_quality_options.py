"""What the options of eval/image_quality.py stand for, without any image."""

import argparse

import pytest

from diffadapt.evaluation import image_quality_cli
from diffadapt.metrics.registry import METRICS


def parse(*arguments):
    parser = argparse.ArgumentParser()
    image_quality_cli.add_options(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--generated", "out", "--reference", "real"], "inception"),
        (["--generated", "embedded:style/fluent3d/train", "--reference", "real"], "inception"),
        (["--generated", "embedded:style/fluent3d/train"], "embedded:clip"),
        (["--generated", "embedded:handwriting:test"], "embedded:digits"),
        (["--adapters", "a.safetensors", "--base", "embedded:emoji"], "embedded:clip"),
        (["--adapters", "a.safetensors", "--base", "somebody/base"], "inception"),
        (["--run", "runs/x", "--base", "embedded:digits"], "embedded:digits"),
        (["--generated", "out", "--protocol", "kynkaanniemi"], "vgg16"),
    ],
)  # fmt: skip
def test_the_default_extractor_is_inception_unless_all_is_embedded(arguments, name, monkeypatch):
    monkeypatch.setattr(image_quality_cli, "load_extractor", lambda name, **given: (name, given["preset"]))
    assert image_quality_cli.load_extractors(parse(*arguments), "cpu")[0][0] == name


@pytest.mark.parametrize(
    ("arguments", "preset"),
    [
        (["--protocol", "piq"], "bilinear"),
        (["--protocol", "adm"], "tf1"),
        (["--protocol", "piq", "--resize", "clean"], "clean"),
        (["--protocol", "piq", "--extractor", "clip"], None),
        ([], None),
    ],
)
def test_the_resize_is_the_protocols_unless_told(arguments, preset, monkeypatch):
    monkeypatch.setattr(image_quality_cli, "load_extractor", lambda name, **given: given["preset"])
    assert image_quality_cli.load_extractors(parse("--generated", "out", *arguments), "cpu") == [preset]


def test_native_lpips_leaves_other_resizes_alone(monkeypatch):
    monkeypatch.setattr(image_quality_cli, "load_extractor", lambda name, **given: given["preset"])
    given = parse(
        "--generated", "out", "--extractor", "clip,lpips:alex", "--resize", "clean", "--lpips_native"
    )
    assert image_quality_cli.load_extractors(given, "cpu") == ["clean", "none"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("precision_recall.k=0", r"precision_recall\.k=0: expected a whole number of at least 1"),
        ("precision_recall.k=3.5", r"k=3\.5: expected a whole number"),
        ("precision_recall.k=abc", "k='abc': expected a whole number"),
        ("precision_recall.k=yes", "k=True: expected a whole number"),
        ("density_coverage.k=-2", "expected a whole number of at least 1"),
        ("kid_subsets.size=0", "expected a whole number of at least 2"),
        ("copy_rate.threshold=2", "expected a number from -1 to 1, or null"),
        ("kid_subsets.sizes=5", "kid_subsets has no option 'sizes'; did you mean size"),
        ("fid.k=5", "fid has no option 'k'; it has none"),
        ("kid_subset.size=5", "unknown metric 'kid_subset'; did you mean kid_subsets"),
    ],
)
def test_options_of_metrics_are_checked_where_they_are_read(text, message):
    with pytest.raises(ValueError, match=message):
        image_quality_cli.plan_from(parse("--metric_options", text))


@pytest.mark.parametrize(
    ("name", "extractor", "preset", "metric"),
    [
        ("dgm", "dinov2:facebook/dinov2-large", "pil", "fid"),
        ("cmmd", "clip:openai/clip-vit-large-patch14-336", "crop-336", "cmmd"),
        ("clip-fid", "clip:openai/clip-vit-base-patch32", "crop-224", "clip_fid"),
        ("adm", "inception", "tf1", "sfid"),
    ],
)
def test_protocols_of_papers_name_their_networks(name, extractor, preset, metric, monkeypatch):
    monkeypatch.setattr(image_quality_cli, "load_extractor", lambda name, **given: (name, given["preset"]))
    arguments = parse("--generated", "out", "--protocol", name)
    assert image_quality_cli.load_extractors(arguments, "cpu") == [(extractor, preset)]
    plan = image_quality_cli.plan_from(arguments)
    assert metric in plan.metrics
    if name == "dgm":
        assert plan.options == {"precision_recall": {"k": 5}, "density_coverage": {"k": 5}}


def test_a_protocol_sets_metrics_and_neighbours_and_the_command_line_wins():
    plan = image_quality_cli.plan_from(parse("--protocol", "piq"))
    assert plan.metrics == ("is_gap", "fid", "kid", "msid", "precision_recall")
    assert plan.options["precision_recall"] == {"k": 5}
    assert image_quality_cli.plan_from(parse("--protocol", "adm")).options["precision_recall"] == {"k": 3}
    other = parse("--protocol", "piq", "--metrics", "fid", "--metric_options", "precision_recall.k=7")
    assert image_quality_cli.plan_from(other).metrics == ("fid",)
    assert image_quality_cli.plan_from(other).options["precision_recall"] == {"k": 7}
    assert all(key in METRICS for key in image_quality_cli.protocols.PROTOCOLS["piq"].metrics)


def test_reading_and_plan_take_their_options(tmp_path):
    given = parse(
        "--skip_bad", "--allow_small", "--allow_overlap", "--no_intervals", "--metrics_seed", "3",
        "--cache_dir", str(tmp_path), "--save_features", "features", "--output", "out/scores.json",
        "--download",
    )  # fmt: skip
    plan, reading = image_quality_cli.plan_from(given), image_quality_cli.read_options_from(given)
    assert (plan.seed, plan.allow_small, plan.intervals) == (3, True, False)
    assert (reading.skip_bad, reading.allow_overlap, reading.download) == (True, True, True)
    assert (reading.cache, str(reading.save_features), str(reading.record_folder)) == (
        tmp_path,
        "features",
        "out",
    )
    assert image_quality_cli.read_options_from(parse("--no_cache")).cache is None


def test_the_demonstration_is_two_disjoint_embedded_sets_and_never_mixes_with_own_data():
    given = parse()
    image_quality_cli.fill_demo(given)
    assert given.generated != [given.reference]
    assert image_quality_cli.is_demo(given)
    own = parse("--generated", "out")
    image_quality_cli.fill_demo(own)
    assert own.reference is None
    assert not image_quality_cli.is_demo(own)
