"""The registry's metrics on two sets: sizes, equal numbers, floors, options, names, wrong input."""

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers.feature_sets import gaussian_sets

from diffadapt.metrics import (
    METRICS,
    Inputs,
    Statistics,
    TooFewImages,
    evaluate,
    fid,
    msid,
    precision_recall,
    score_name,
)
from diffadapt.metrics.analytic import analytic_cases
from diffadapt.metrics.similarity import ceiling_similarity

SMALL = {"kid_subsets": {"size": 20, "subsets": 5}, "inception_score": {"splits": 5}, "is_gap": {"splits": 5}}


def _distance(first, second):
    return (first - second).abs().mean(dim=(1, 2, 3))


def _inputs(rows, seed=0):
    n, generator = len(rows), torch.Generator().manual_seed(seed)
    return Inputs(
        {
            "features": rows,
            "logits": 3 * rows,
            "texts": rows + torch.randn(rows.shape, dtype=rows.dtype, generator=generator),
            "pixels": torch.rand(n, 3, 4, 4, generator=generator),
            "groups": torch.arange(n) // 5,
            "raw": 2 * rows,
            "spatial": rows[:, :5],
            "preference": rows[:, :1],
        }
    )


@pytest.fixture
def sets():
    real, generated = gaussian_sets(120, 90)
    training = gaussian_sets(80, seed=3)[0]
    return {"real": _inputs(real), "generated": _inputs(generated, 1), "train": _inputs(training)}


@pytest.mark.parametrize("key", METRICS)
def test_every_metric_gives_value_interval_floor_and_size(sets, key):
    found = evaluate(key, **sets, allow_small=True, network=_distance, **SMALL.get(key, {}))
    assert tuple(found.values) == METRICS[key].scores
    assert found.n["generated"] == 90
    assert ("real" in found.n) == bool(METRICS[key].real)
    for estimate in found.values.values():
        assert estimate.interval.low <= estimate.interval.high
        assert estimate.interval.method
    if key in ("copy_rate", "preference"):
        assert found.floor is None
    elif METRICS[key].floor == "sizes":  # 90 and 90 different real images are not among 120
        assert found.floor is None
        assert "no floor: it would take 90 and 90 different real images, the reference has 120" in found.notes
    else:
        assert set(found.floor) == set(found.values)
        assert 1 < found.floor_n <= 120
    assert set(found.options) == set(METRICS[key].options)


@pytest.mark.parametrize("key", METRICS)
def test_values_are_the_same_without_intervals(sets, key):
    options = {"allow_small": True, "network": _distance, **SMALL.get(key, {})}
    whole = evaluate(key, **sets, **options)
    bare = evaluate(key, **sets, **options, intervals=False, floor=False)
    assert bare.floor is None
    for score, estimate in bare.values.items():
        assert estimate.value == pytest.approx(whole.values[score].value, rel=1e-12)


NOT_FEATURES = ("lpips_diversity", "preference")  # read pixels, and numbers of a plug-in


@pytest.mark.parametrize("key", [key for key in METRICS if key not in NOT_FEATURES])
def test_broken_features_are_refused(sets, key):
    broken = dict(sets["generated"].features)
    for role in ("features", "logits", "raw", "spatial"):
        broken[role] = broken[role].clone()
        broken[role][7, 0] = torch.nan
    with pytest.raises(ValueError, match="features of 1 of 90 images are NaN or infinite, first in row 7"):
        evaluate(
            key,
            real=sets["real"],
            train=sets["train"],
            generated=Inputs(broken),
            allow_small=True,
            equalise=False,
            **SMALL.get(key, {}),
        )


@pytest.mark.parametrize("key", METRICS)
def test_fewer_images_than_the_minimum_are_refused_or_stamped(sets, key):
    few = {role: each.sample(9 if role == "generated" else 100, 0) for role, each in sets.items()}
    if METRICS[key].minimum(12, METRICS[key].options) <= 9:
        few["generated"] = few["generated"].sample(3, 0)
    n = few["generated"].n
    with pytest.raises(TooFewImages, match=f"{n} generated images, below the minimum of .* --allow_small"):
        evaluate(key, **few, network=_distance)


def test_a_small_set_that_is_allowed_is_stamped(sets):
    few = sets["generated"].sample(20, 0)
    found = evaluate("fid", real=sets["real"], generated=few, allow_small=True)
    assert found.notes[0] == "20 generated images, below the minimum of 24 for fid: not comparable"
    small_reference = evaluate("fid", real=few, generated=sets["generated"], allow_small=True)
    assert small_reference.notes[0].startswith("20 real images, below the minimum of 24")


def test_unequal_sets_are_cut_to_one_size_or_warned_of(sets):
    found = evaluate("precision_recall", **sets, allow_small=True)
    assert found.n == {"generated": 90, "real": 90}
    assert "90 images of each set, of 90 generated and 120 real" in found.notes
    whole = evaluate("precision_recall", **sets, allow_small=True, equalise=False)
    assert whole.n == {"generated": 90, "real": 120}
    assert any("moves with the numbers of images" in note for note in whole.notes)
    expected = precision_recall(real=sets["real"]["features"], generated=sets["generated"]["features"])
    assert (whole.values["precision"].value, whole.values["recall"].value) == pytest.approx(expected)
    assert evaluate("fid", **sets).n == {"generated": 90, "real": 120}


def test_floor_of_fid_is_of_disjoint_real_images_scaled_to_the_sizes_of_the_score(sets):
    found = evaluate("fid", **sets)
    floors = found.floor
    assert found.floor_n == 60  # half of the reference
    first, second = sets["real"].parts(60, 60, 0)
    between = fid(real=second["features"], generated=first["features"])
    expected = between * (1 / 90 + 1 / 120) / (1 / 60 + 1 / 60)
    assert floors["fid"] == pytest.approx(expected)
    rows = torch.cat([first["features"], second["features"]])
    assert len(rows.unique(dim=0)) == 120
    note = "floor of 60 against 60 other real images, its sampling bias scaled by 0.583 to 90 against 120"
    assert note in found.notes
    few = evaluate("fid", real=sets["real"], generated=sets["generated"].sample(30, 0))
    assert any(note.startswith("floor of 30 against 90 other real images") for note in few.notes)


def test_floors_that_move_with_the_numbers_are_of_the_scores_numbers_or_none(sets):
    real = _inputs(gaussian_sets(200)[0])
    for key in ("precision_recall", "density_coverage", "msid", "is_gap"):
        options = {"allow_small": True, "intervals": False, **SMALL.get(key, {})}
        found = evaluate(key, real=real, generated=sets["generated"], **options)
        assert "floor of 90 against 90 other real images" in found.notes
        assert found.floor_n == 90
        larger = _inputs(gaussian_sets(200, 120)[1])
        found = evaluate(key, real=real, generated=larger, **options)
        assert found.floor is None
        assert (
            "no floor: it would take 120 and 120 different real images, the reference has 200" in found.notes
        )
    for key in ("inception_score", "vendi"):
        options = {"allow_small": True, "intervals": False, **SMALL.get(key, {})}
        found = evaluate(key, real=sets["generated"], generated=sets["real"], **options)
        assert found.floor is None
        assert "no floor: it would take 120 real images, there are 90" in found.notes


@pytest.mark.parametrize("sizes", [(120, 120), (60, 240), (300, 60), (120, 130)])
@pytest.mark.parametrize("key", ["fid", "fid_infinity", "cmmd", "msid", "precision_recall", "vendi"])
@pytest.mark.slow
def test_a_perfect_generator_does_not_beat_the_floor(key, sizes):
    """Over draws of both sets from one distribution the score is as often above its floor as below."""
    if key == "msid" and sizes != (60, 240):
        pytest.skip("has no floor there")
    options = {"allow_small": True, "intervals": False}
    beaten = []
    for seed in range(30):
        rows, _ = gaussian_sets(sum(sizes), width=8, seed=seed)
        generated, real = (Inputs({"features": part}) for part in rows.split(sizes))
        found = evaluate(key, real=real, generated=generated, seed=seed, **options)
        if found.floor is None:
            assert METRICS[key].floor in ("sizes", "self"), key
            return
        (score, estimate), *_ = found.values.items()
        margin = estimate.value - found.floor[score]
        beaten.append(margin < 0 if METRICS[key].better == "lower" else margin > 0)
    assert 0.2 <= sum(beaten) / len(beaten) <= 0.8


def test_an_interval_that_fails_costs_itself_alone():
    """The graphs of halves of 12 images are too small for five neighbours, that of all 12 is not."""
    real, generated = gaussian_sets(12, 12)
    found = evaluate(
        "msid", real=Inputs({"features": real}), generated=Inputs({"features": generated}), allow_small=True
    )
    assert found.values["msid"].value == pytest.approx(msid(real=real, generated=generated))
    assert found.values["msid"].interval is None
    assert any(note.startswith("no interval: a graph of 5 neighbours needs") for note in found.notes)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("precision_recall", {"k": 0}), ("precision_recall", {"k": -1}), ("precision_recall", {"k": 3.5}),
        ("precision_recall", {"k": "abc"}), ("precision_recall", {"k": True}), ("density_coverage", {"k": 0}),
        ("msid", {"k": 0}), ("kid_subsets", {"size": 1}), ("kid_subsets", {"subsets": 0}),
        ("kid_subsets", {"seed": -1}), ("inception_score", {"splits": 0}), ("is_gap", {"splits": 2.0}),
        ("inception_score", {"seed": 2**32}), ("copy_rate", {"threshold": 1.5}),
        ("copy_rate", {"threshold": "high"}), ("copy_rate", {"threshold": float("nan")}),
        ("kid_subsets", {"size": None}),
    ],
)  # fmt: skip
def test_options_out_of_their_range_are_refused_before_any_set_is_looked_at(key, options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"{key}\.{name}=.*: expected a (whole )?number"):
        evaluate(key, generated=None, metric_options=options)


def test_floor_of_similarity_is_the_ceiling_of_the_subject(sets):
    found = evaluate("clip_i", **sets)
    assert found.floor == {"clip_i": ceiling_similarity(real=sets["real"]["features"])}


def test_a_metric_without_reference_takes_one_as_its_floor(sets):
    alone = evaluate("vendi", generated=sets["generated"], allow_small=True)
    assert alone.floor is None
    beside = evaluate("vendi", **sets, allow_small=True)
    assert beside.values == alone.values
    assert beside.floor_n == 90  # as many real images as generated ones


def test_one_reference_is_prepared_once_for_all_generated_sets(sets, monkeypatch):
    calls, nearest = [], Inputs.neighbours.__globals__["neighbour_distances"]
    monkeypatch.setattr(
        "diffadapt.metrics.feature_set.neighbour_distances", lambda *given: calls.append(1) or nearest(*given)
    )
    for scale in (1, 2, 3):
        generated = _inputs(scale * sets["generated"]["features"])
        for key in ("precision_recall", "density_coverage"):
            evaluate(key, real=sets["real"], generated=generated, allow_small=True, floor=False)
    assert len(calls) == 1 + 3  # the reference, and each generated set


def test_imported_statistics_give_the_frechet_distance_only(sets):
    known = sets["real"].statistics
    imported = Inputs.of_statistics(Statistics(known.mean, known.covariance, None, note="of unknown images"))
    found = evaluate("fid", real=imported, generated=sets["generated"])
    expected = evaluate("fid", **sets).values["fid"]
    assert found.values["fid"].value == pytest.approx(expected.value)
    assert (found.n, found.floor) == ({"generated": 90}, None)
    assert "of unknown images" in found.notes
    with pytest.raises(ValueError, match="kid needs 'features' of the real images"):
        evaluate("kid", real=imported, generated=sets["generated"])


def test_what_is_missing_or_unknown_is_named(sets):
    with pytest.raises(ValueError, match="unknown metric 'fld'; there are fid, "):
        evaluate("fld", **sets)
    with pytest.raises(ValueError, match="precision_recall has no option 'n'; known: k"):
        evaluate("precision_recall", **sets, n=3)
    with pytest.raises(ValueError, match="fid compares with real images; give a reference"):
        evaluate("fid", generated=sets["generated"])
    with pytest.raises(
        ValueError, match="authpct compares with the images trained on; give them with --train"
    ):
        evaluate("authpct", generated=sets["generated"], allow_small=True)
    with pytest.raises(ValueError, match="fid has no option 'k'; it has none"):
        evaluate("fid", **sets, k=3)
    with pytest.raises(ValueError, match="inception_score needs 'logits' of the generated images"):
        evaluate("inception_score", generated=Inputs({"features": torch.randn(9, 2)}))
    with pytest.raises(ValueError, match="needs the weights of an LPIPS backbone"):
        evaluate("lpips_diversity", **sets)
    with pytest.raises(ValueError, match="unknown role 'pool'"):
        Inputs({"pool": torch.randn(9, 2)})
    with pytest.raises(ValueError, match="roles of different numbers of images"):
        Inputs({"features": torch.randn(9, 2), "logits": torch.randn(8, 2)})
    with pytest.raises(ValueError, match="without features"):
        Inputs({})
    with pytest.raises(ValueError, match=r"width 12 .* and 5"):
        evaluate("fid", real=sets["real"], generated=Inputs({"features": torch.randn(90, 5)}))


@pytest.mark.parametrize(
    ("score", "extractor", "layer", "name"),
    [
        ("fid", "inception", "pool", "fid"),
        ("fid", "inception", None, "fid"),
        ("fid", "inception", "768", "frechet_distance[inception:768]"),
        ("fid", "embedded:clip", "image", "frechet_distance[embedded:clip:image]"),
        ("fid", "embedded:clip", None, "frechet_distance[embedded:clip]"),
        ("inception_score", "inception", "logits_unbiased", "inception_score"),
        ("inception_score", "embedded:digits", None, "classifier_score[embedded:digits]"),
        ("is_gap", "embedded:digits", None, "classifier_score_gap[embedded:digits]"),
        ("kid", "dino:facebook/dino-vits16", None, "kernel_distance[dino:facebook/dino-vits16]"),
        ("clip_i", "clip:openai/clip-vit-base-patch32", None, "clip_i[clip:openai/clip-vit-base-patch32]"),
        ("clip_i", "embedded:clip", None, "image_similarity[embedded:clip]"),
        ("clip_t", "embedded:clip", None, "text_similarity[embedded:clip]"),
        ("dino", "dino:facebook/dino-vits16", None, "dino[dino:facebook/dino-vits16]"),
        ("dino", "dinov2:x", None, "image_similarity[dinov2:x]"),
        ("precision", "inception", None, "precision[inception]"),
        ("msid", "vgg16", None, "msid[vgg16]"),
        ("fid", "dinov2:facebook/dinov2-large", "class_token", "fd_dinov2[dinov2:facebook/dinov2-large]"),
        ("fid", "dino:x", "class_token", "frechet_distance[dino:x:class_token]"),
        ("fid", "dinov2:x", None, "frechet_distance[dinov2:x]"),
        ("precision", "dinov2:x", "class_token", "precision[dinov2:x:class_token]"),
        (
            "cmmd",
            "clip:openai/clip-vit-large-patch14-336",
            None,
            "cmmd[clip:openai/clip-vit-large-patch14-336]",
        ),
        ("cmmd", "embedded:clip", None, "gaussian_discrepancy[embedded:clip]"),
        ("clip_fid", "clip:x", None, "clip_fid[clip:x]"),
        ("sfid", "inception", None, "sfid[inception]"),
    ],
)
def test_a_score_has_the_fields_name_only_with_the_fields_extractor(score, extractor, layer, name):
    assert score_name(score, extractor, layer) == name


@pytest.mark.parametrize("case", analytic_cases(), ids=lambda case: case.name)
def test_analytic_cases_hold(case):
    assert case.passed, case
    assert not dataclasses.replace(case, computed=case.expected + 2 * case.tolerance).passed


def test_the_page_of_metrics_names_every_metric_and_its_minimum():
    lines = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8").splitlines()
    rows = {line.split("|")[1]: line.split("|")[4] for line in lines if line.startswith("| `")}
    for key, metric in METRICS.items():
        (needed,) = [cell for names, cell in rows.items() if f"`{key}`" in names]
        minimum = metric.minimum(2048, metric.options)
        expected = str(minimum) if metric.minimum(1, metric.options) == minimum else "2 x width"
        if "splits" in metric.options:
            expected = f"{minimum // metric.options['splits']} per split"
        assert expected in needed, key
