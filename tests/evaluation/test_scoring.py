"""Scores from sets of images: the metrics' own values, named and identified for what they are."""

import numpy as np
import pytest
import torch
import torch_fidelity
from helpers.image_files import write_images
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from toy_extractor import Toy

from diffadapt.evaluation import protocols
from diffadapt.evaluation.evaluate_sets import ReadOptions, evaluate_sets
from diffadapt.evaluation.features.extractors import load_extractor
from diffadapt.evaluation.record import IDENTITY, differences
from diffadapt.evaluation.scoring import Plan, check_plan, parse_metrics, plan_for
from diffadapt.evaluation.sets.image_sets import ImageSet, open_set
from diffadapt.metrics import fid, kid, vendi

TOY = "toy_extractor:Toy"
SMALL = Plan(allow_small=True)
VENDI = Plan(("vendi",), allow_small=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    real = write_images(root / "real", 60, first=1000, size=(8, 8))
    return {
        "a": str(write_images(root / "a", 50, size=(8, 8))),
        "b": str(write_images(root / "b", 50, first=100, size=(8, 8))),
        "real": str(real),
    }


def scored(generated, real, plan=SMALL, read_options=None, extractor=TOY, **options):
    extractors = [load_extractor(name) for name in extractor.split(",")]
    return evaluate_sets(
        generated, real, extractors, plan, read_options=read_options or ReadOptions(), **options
    ).record


def features(folder):
    extractor = load_extractor(TOY)
    pixels = torch.stack([image.load()[0] for image in open_set(folder).images])
    return extractor(pixels)["wide"]


@pytest.fixture(scope="module")
def record(folders):
    Toy.images_seen = 0
    found = scored({"a": folders["a"], "b": folders["b"]}, folders["real"])
    assert Toy.images_seen == 160  # once each, whatever the metrics
    return found


def test_values_are_those_of_the_pure_functions(record, folders):
    values = {score.name: score.value for score in record.of("b")}
    real, generated = features(folders["real"]), features(folders["b"])
    assert values[f"frechet_distance[{TOY}]"] == pytest.approx(fid(real=real, generated=generated), rel=1e-6)
    assert values[f"kernel_distance[{TOY}]"] == pytest.approx(kid(real=real, generated=generated), rel=1e-4)
    assert values[f"vendi[{TOY}]"] == pytest.approx(vendi(features=generated), rel=1e-6)


def test_no_score_takes_a_name_of_inception_clip_or_dino(record):
    names = {score.name for score in record.scores}
    assert all(name.endswith(f"[{TOY}]") for name in names)
    assert not {name.partition("[")[0] for name in names} & {
        "fid",
        "kid",
        "inception_score",
        "clip_i",
        "dino",
    }


def test_everything_small_is_stamped_and_the_rest_is_refused_by_name(record):
    frechet_score = next(score for score in record.of("a") if score.metric == "fid")
    assert any("not comparable" in note for note in frechet_score.notes) == (50 < 2 * 16)
    precision = next(score for score in record.of("a") if score.name.startswith("precision"))
    assert any("below the minimum" in note for note in precision.notes)
    assert "subsets of 1000" in record.refused[f"a: kernel_distance_subsets[{TOY}]"]


def test_a_metric_asked_for_by_name_is_refused_below_its_minimum(folders):
    with pytest.raises(ValueError, match="--allow_small"):
        scored({"a": folders["a"]}, folders["real"], Plan(metrics=("precision_recall",)))


def test_intervals_and_floors_stand_beside_the_values(record):
    score = next(score for score in record.of("a") if score.metric == "fid")
    assert score.interval.low < score.interval.high
    assert score.floor > 0
    assert score.n == {"generated": 50, "real": 60}
    assert score.better == "lower"


def test_identities_hold_all_fields_and_change_with_what_changes_numbers(record, folders):
    first = {score.name: score for score in record.of("a")}
    assert all(set(score.identity) == set(IDENTITY) for score in first.values())
    again = scored({"other": folders["b"]}, folders["real"])
    for score in again.scores:
        assert differences(first[score.name], score) == []
    other = scored(
        {"a": folders["a"]},
        folders["b"],
        Plan(("precision_recall",), {"precision_recall": {"k": 7}}, 1, True),
    )
    named = {line.partition(":")[0] for line in differences(first[other.scores[0].name], other.scores[0])}
    assert {"options", "reference", "seed"} <= named
    preset = evaluate_sets(
        {"a": folders["a"]},
        None,
        [load_extractor(TOY, preset="tf1")],
        Plan(("vendi",), allow_small=True),
        read_options=ReadOptions(),
    ).record
    named = {line.partition(":")[0] for line in differences(first[f"vendi[{TOY}]"], preset.scores[0])}
    assert named == {"preset"}


def test_rows_name_the_nearest_reference_image(record, folders):
    row = record.images[0]
    generated, real = (
        torch.nn.functional.normalize(features(folders[name]).double()) for name in ("a", "real")
    )
    best = (generated[0] @ real.T).max(dim=0)
    assert (row.generated, row.name, row.nearest) == (
        "a",
        "image-000.png",
        f"image-{int(best.indices):03d}.png",
    )
    assert row.values["nearest_similarity"] == pytest.approx(float(best.values), abs=1e-6)
    assert row.values["realism"] > 0
    assert len(record.images) == 100


def test_saved_features_score_as_the_images_do(record, folders, tmp_path):
    reading = ReadOptions(save_features=tmp_path, record_folder=tmp_path / "records")
    kept = scored({"a": folders["a"]}, folders["real"], Plan(("fid",)), reading)
    assert kept.sets["a"].features == "../a"
    file = str(tmp_path / "reference" / "toy_extractor-Toy.safetensors")
    again = scored({"a": folders["a"]}, file, Plan(("fid",)))
    assert again.scores[0].value == kept.scores[0].value
    assert {row.nearest for row in again.images} == {None}  # there is no image to show
    assert differences(again.scores[0], kept.scores[0]) == []
    with pytest.raises(ValueError, match="holds features of another extractor"):
        scored({"a": folders["a"]}, file, extractor="embedded:clip")


def test_published_statistics_give_the_frechet_distance_and_nothing_else(folders, tmp_path):
    real = features(folders["real"]).double().numpy()
    np.savez(tmp_path / "stats.npz", mu=real.mean(0), sigma=np.cov(real, rowvar=False))
    found = scored({"a": folders["a"]}, str(tmp_path / "stats.npz"))
    direct = fid(real=features(folders["real"]), generated=features(folders["a"]))
    score = next(score for score in found.scores if score.metric == "fid")
    assert score.value == pytest.approx(direct, rel=1e-6)
    assert any("not known" in note for note in score.notes)
    assert {s.metric for s in found.scores if s.n.get("real") is None} >= {"fid", "vendi"}
    assert "precision_recall" not in {s.metric for s in found.scores}


def test_without_a_reference_only_what_needs_none(folders):
    found = scored({"a": folders["a"]}, None)
    assert {score.metric for score in found.scores} == {"vendi", "inception_score"}


def test_several_extractors_in_one_pass_keep_their_names(folders):
    found = scored(
        {"a": folders["a"]},
        folders["real"],
        Plan(("vendi",), allow_small=True),
        extractor=f"{TOY},embedded:clip",
    )
    assert [score.name for score in found.scores] == [f"vendi[{TOY}]", "vendi[embedded:clip]"]
    assert [e.name for e in found.extractors] == [TOY, "embedded:clip"]


def test_named_metrics_go_to_the_extractor_they_are_meant_for():
    toy, clip = load_extractor(TOY), load_extractor("embedded:clip")
    plan = Plan(("clip_i", "fid"))
    assert plan_for(clip, [toy, clip], plan).metrics == ("clip_i", "fid")
    assert plan_for(toy, [toy, clip], plan).metrics == ("fid",)
    assert plan_for(toy, [toy], plan).metrics == ("clip_i", "fid")
    assert plan_for(toy, [toy, clip], Plan(("clip_i",))) is None
    assert plan_for(toy, [toy, clip], Plan()) == Plan()


@pytest.mark.parametrize(
    ("metric", "extractor", "options", "message"),
    [
        ("inception_score", "embedded:clip", {}, "gives no logits"),
        ("clip_t", TOY, {"has_prompts": True}, "knows no texts"),
        ("clip_t", "embedded:clip", {}, "needs the images' prompts"),
        ("lpips_diversity", TOY, {"has_prompts": True}, "needs an lpips: extractor"),
        ("fid", TOY, {"has_reference": False}, "needs a --reference"),
    ],
)
def test_what_cannot_be_computed_is_refused_before_any_image_is_read(metric, extractor, options, message):
    facts = {"has_reference": True, "has_prompts": False, **options}
    with pytest.raises(ValueError, match=message):
        check_plan(Plan((metric,)), [load_extractor(extractor)], **facts)


def test_an_extractor_with_which_nothing_can_be_computed_is_refused():
    lpips = load_extractor("lpips:squeeze", smoke=True)
    with pytest.raises(ValueError, match=r"no metric can be computed with 'lpips:squeeze'.*prompts"):
        check_plan(Plan(), [lpips], has_reference=True, has_prompts=False)
    check_plan(Plan(), [lpips], has_reference=False, has_prompts=True)


def test_lpips_diversity_is_of_the_images_of_one_prompt(folders):
    lazy_images = open_set(folders["a"]).images[:4]
    images = ImageSet("a", "adapter", lazy_images, prompts=("x", "y", "x", "y"))
    lpips = load_extractor("lpips:squeeze", smoke=True)
    found = evaluate_sets({"a": images}, None, [lpips], SMALL, read_options=ReadOptions()).record
    rows = [lpips(image.load()[0][None])["lpips"][0].double() for image in lazy_images]
    pairs = [(rows[0] - rows[2]).square().sum(), (rows[1] - rows[3]).square().sum()]
    (score,) = found.scores
    assert score.name == "lpips_diversity[lpips:squeeze]"
    assert score.value == pytest.approx(float(sum(pairs) / 2), rel=1e-4)
    assert found.stamp == "NOT A SCORE"


def test_an_unknown_metric_gets_the_nearest():
    assert parse_metrics("all") == ()
    assert parse_metrics("fid, kid,fid") == ("fid", "kid")
    with pytest.raises(ValueError, match=r"did you mean .*kid"):
        parse_metrics("kidd")
    with pytest.raises(ValueError, match="no metric"):
        parse_metrics(",")


def test_protocols_warn_of_fewer_images_than_theirs(folders):
    found = scored({"a": folders["a"]}, folders["real"], protocol="adm")
    assert any("adm takes 50,000 generated and 10,000 real" in line for line in found.warnings)
    enough = {"n_generated": 50_000, "n_real": 10_000}
    assert protocols.shortfall("adm", **enough) == []
    with pytest.raises(ValueError, match="did you mean piq"):
        protocols.protocol("pic")


class FidelityToy(FeatureExtractorBase):
    """The toy in torch-fidelity's own run."""

    def __init__(self, name, features_list, **options):
        super().__init__(name, features_list)
        self.toy = Toy()

    @staticmethod
    def get_provided_features_list():
        return "wide", "scores"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "scores" if metric == "isc" else "wide"

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, images):
        found = self.toy(images.float())
        return tuple(found[name] for name in self.features_list)


def test_a_whole_run_agrees_with_torch_fidelity(folders):
    torch_fidelity.register_feature_extractor("toy-for-test", FidelityToy)
    expected = torch_fidelity.calculate_metrics(
        input1=folders["a"], input2=folders["b"], feature_extractor="toy-for-test", cuda=False,
        isc=True, fid=True, kid=True, prc=True, isc_splits=2, kid_subset_size=30, kid_subsets=10,
        cache=False, save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    options = {"inception_score": {"splits": 2}, "kid_subsets": {"size": 30, "subsets": 10}}
    plan = Plan(("inception_score", "fid", "kid_subsets", "precision_recall"), options, 0, True, False)
    found = {
        score.name.partition("[")[0]: score
        for score in scored({"a": folders["a"]}, folders["b"], plan).scores
    }
    assert found["classifier_score"].value == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert found["frechet_distance"].value == pytest.approx(expected["frechet_inception_distance"], rel=1e-5)
    for name in ("precision", "recall"):
        assert found[name].value == pytest.approx(expected[name], abs=1e-7)
    subsets = expected["kernel_inception_distance_mean"]
    assert found["kernel_distance_subsets"].value == pytest.approx(subsets, abs=1e-7)  # theirs in float32
