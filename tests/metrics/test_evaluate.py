"""The registry's metrics on two sets: sizes, equal numbers, floors, options, names, wrong input."""

import dataclasses
from pathlib import Path

import pytest
import torch
from feature_sets import gaussian_sets

from diffadapt.metrics import (
    METRICS,
    Inputs,
    Statistics,
    TooFewImages,
    evaluate,
    fid,
    precision_recall,
    score_name,
)
from diffadapt.metrics.analytic import analytic_cases
from diffadapt.metrics.evaluate import real_floor
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
        }
    )


@pytest.fixture
def sets():
    real, generated = gaussian_sets(120, 90)
    return {"real": _inputs(real), "generated": _inputs(generated, 1)}


@pytest.mark.parametrize("key", METRICS)
def test_every_metric_gives_value_interval_floor_and_size(sets, key):
    found = evaluate(key, **sets, allow_small=True, network=_distance, **SMALL.get(key, {}))
    assert tuple(found.values) == METRICS[key].scores
    assert found.n["generated"] == 90
    assert ("real" in found.n) == bool(METRICS[key].real)
    for estimate in found.values.values():
        assert estimate.interval.low <= estimate.interval.high
        assert estimate.interval.method
    if key == "copy_rate":
        assert found.floor is None
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


@pytest.mark.parametrize("key", [key for key in METRICS if key != "lpips_diversity"])  # that reads pixels
def test_broken_features_are_refused(sets, key):
    broken = dict(sets["generated"].features)
    for role in ("features", "logits"):
        broken[role] = broken[role].clone()
        broken[role][7, 0] = torch.nan
    with pytest.raises(ValueError, match="features of 1 of 90 images are NaN or infinite, first in row 7"):
        evaluate(
            key,
            real=sets["real"],
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


def test_floor_compares_disjoint_halves_of_the_reference(sets):
    floors, n = real_floor("fid", real=sets["real"], n=90)
    assert n == 60  # half of the reference
    first, second = sets["real"].halves(60, 0)
    assert floors["fid"] == pytest.approx(fid(real=second["features"], generated=first["features"]))
    rows = torch.cat([first["features"], second["features"]])
    assert len(rows.unique(dim=0)) == 120
    found = evaluate("fid", **sets)
    assert found.floor == pytest.approx(floors)
    assert "floor of 60 real images in each set, the score is of 90" in found.notes


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
        "diffadapt.metrics.inputs.neighbour_distances", lambda *given: calls.append(1) or nearest(*given)
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
    with pytest.raises(ValueError, match="precision_recall has no option 'n'; it has k"):
        evaluate("precision_recall", **sets, n=3)
    with pytest.raises(ValueError, match="fid compares with real images; give a reference"):
        evaluate("fid", generated=sets["generated"])
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
    ],
)
def test_a_score_has_the_fields_name_only_with_the_fields_extractor(score, extractor, layer, name):
    assert score_name(score, extractor, layer) == name


@pytest.mark.parametrize("case", analytic_cases(), ids=lambda case: case.name)
def test_analytic_cases_hold(case):
    assert case.passed, case
    assert not dataclasses.replace(case, found=case.expected + 2 * case.tolerance).passed


def test_the_page_of_metrics_names_every_metric_and_its_minimum():
    lines = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text().splitlines()
    rows = {line.split("|")[1]: line.split("|")[4] for line in lines if line.startswith("| `")}
    for key, metric in METRICS.items():
        (needed,) = [cell for names, cell in rows.items() if f"`{key}`" in names]
        minimum = metric.minimum(2048, metric.options)
        expected = {"fid": "2 x width", "fid_infinity": "2 x width"}.get(key, str(minimum))
        if "splits" in metric.options:
            expected = f"{minimum // metric.options['splits']} per split"
        assert expected in needed, key
