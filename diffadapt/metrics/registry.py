"""The table of all metrics. To add one, write its function, a binding in `bindings.py` and an entry here.

`docs/metrics.md` lists them for users, and a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from diffadapt.metrics import bindings
from diffadapt.metrics.feature_set import FeatureSet
from diffadapt.metrics.metric import Metric, Minimum

_DREAMBOOTH = "Ruiz et al. 2023, arXiv:2208.12242"
_MEAN_INTERVAL = "Student's t over images, or over prompts where they are known (bootstrap from 30 on)"
_HALVES_INTERVAL = "spread of random halves"
_PROPORTION_INTERVAL = "Clopper-Pearson"


def _at_least(n: int) -> Minimum:
    return lambda width, options: n


def _per_split(n: int) -> Minimum:
    return lambda width, options: n * options["splits"]


def _twice_the_width(width: int, options: Mapping[str, object]) -> int:
    return 2 * width  # a covariance of fewer images is singular, or nearly so


def _subset_size(width: int, options: Mapping[str, object]) -> int:
    return options["size"]


def _bias_of_both(n_generated: int, n_real: int) -> float:
    """The mean distance of two samples of one distribution goes with 1/n of both."""
    return 1 / n_generated + 1 / n_real


def _bias_of_reference(n_generated: int, n_real: int) -> float:
    """What remains of it when the generated images are extrapolated to infinitely many."""
    return 1 / n_real


def _as_other_training_images(real: FeatureSet) -> float:
    """FLS is 100 by definition for images as good as other training images."""
    return 100.0


_ALL = (
    Metric(
        key="fid",
        scores=("fid",),
        generated=("features",),
        real=("statistics",),
        better="lower",
        value=bindings.frechet_distance_value,
        estimate=bindings.frechet_distance_estimate,
        interval="reverse bootstrap over generated images",
        source="Heusel et al. 2017, arXiv:1706.08500",
        minimum=_twice_the_width,
        floor="halves",
        bias=_bias_of_both,
    ),
    Metric(
        key="sfid",
        scores=("sfid",),
        generated=("spatial",),
        real=("spatial_statistics",),
        extractor="inception",
        better="lower",
        value=partial(bindings.frechet_distance_value, statistics="spatial_statistics"),
        estimate=partial(bindings.frechet_distance_estimate, statistics="spatial_statistics"),
        interval="reverse bootstrap over generated images",
        source="Nash et al. 2021, arXiv:2103.03841",
        minimum=_twice_the_width,
        floor="halves",
        bias=_bias_of_both,
        is_extra=True,
    ),
    Metric(
        key="clip_fid",
        scores=("clip_fid",),
        generated=("raw",),
        real=("raw_statistics",),
        extractor="clip",
        better="lower",
        value=partial(bindings.frechet_distance_value, statistics="raw_statistics"),
        estimate=partial(bindings.frechet_distance_estimate, statistics="raw_statistics"),
        interval="reverse bootstrap over generated images",
        source="Kynkaanniemi et al. 2023, arXiv:2203.06026",
        minimum=_twice_the_width,
        floor="halves",
        bias=_bias_of_both,
        is_extra=True,
    ),
    Metric(
        key="fid_infinity",
        scores=("fid_infinity",),
        generated=("features",),
        real=("statistics",),
        better="lower",
        value=bindings.fid_infinity_value,
        estimate=bindings.fid_infinity_estimate,
        interval="normal; influence of each generated image and scatter of the subsets",
        source="Chong and Forsyth 2020, arXiv:1911.07023",
        minimum=_twice_the_width,
        required=lambda options: 20,  # a line through Frechet distances of subsets
        floor="halves",
        bias=_bias_of_reference,
    ),
    Metric(
        key="kid",
        scores=("kid",),
        generated=("features",),
        real=("features",),
        better="lower",
        estimate=bindings.kid_estimate,
        interval="normal; variance of the U-statistic",
        source="Binkowski et al. 2018, arXiv:1801.01401",
        minimum=_at_least(500),
        floor="halves",  # unbiased: the sizes of the parts do not matter
    ),
    Metric(
        key="kid_subsets",
        scores=("kid_subsets",),
        generated=("features",),
        real=("features",),
        better="lower",
        value=bindings.kid_subsets_value,
        estimate=bindings.kid_subsets_estimate,
        interval="normal; variance of the U-statistic and of the choice of subsets",
        source="Binkowski et al. 2018, arXiv:1801.01401",
        minimum=_subset_size,
        required=lambda options: options["size"],
        options={"subsets": 100, "size": 1000, "seed": 2020},
        floor="halves",  # unbiased, like kid
    ),
    Metric(
        key="cmmd",
        scores=("cmmd",),
        generated=("unit",),
        real=("unit",),
        extractor="clip",
        better="lower",
        estimate=bindings.cmmd_estimate,
        interval="normal; variance of the U-statistic",
        source="Jayasumana et al. 2024, arXiv:2401.09603",
        minimum=_at_least(500),
        floor="halves",
        bias=_bias_of_both,
    ),
    Metric(
        key="inception_score",
        scores=("inception_score",),
        generated=("logits",),
        better="higher",
        value=bindings.inception_score_value,
        estimate=bindings.inception_score_estimate,
        interval="Student's t over splits; random halves with a single split",
        source="Salimans et al. 2016, arXiv:1606.03498",
        minimum=_per_split(500),
        required=lambda options: 2 * options["splits"],
        options={"splits": 10, "seed": 2020},
        floor="self",  # of as many images, as it rises with their number
    ),
    Metric(
        key="is_gap",
        scores=("is_gap",),
        generated=("logits",),
        real=("logits",),
        better="lower",
        value=bindings.is_gap_value,
        estimate=bindings.is_gap_estimate,
        interval="Student's t over splits of both sets",
        source="difference of Inception Scores (Salimans et al. 2016, arXiv:1606.03498)",
        minimum=_per_split(500),
        required=lambda options: 2 * options["splits"],
        options={"splits": 10, "seed": 2020},
        equal_n=True,  # the score rises with the images of a split
        floor="sizes",
    ),
    Metric(
        key="precision_recall",
        scores=("precision", "recall"),
        generated=("features",),
        real=("features",),
        better="higher",
        estimate=bindings.precision_recall_estimates,
        interval=_PROPORTION_INTERVAL,
        source="Kynkaanniemi et al. 2019, arXiv:1904.06991",
        minimum=_at_least(1000),
        required=lambda options: options["k"] + 1,
        options={"k": 3},
        equal_n=True,  # balls shrink as their set grows
        floor="sizes",
        version="1, ties count",
    ),
    Metric(
        key="density_coverage",
        scores=("density", "coverage"),
        generated=("features",),
        real=("features",),
        better="higher",
        estimate=bindings.density_coverage_estimates,
        interval="density: standard errors over both sets; coverage: Clopper-Pearson",
        source="Naeem et al. 2020, arXiv:2002.09797",
        minimum=_at_least(1000),
        required=lambda options: options["k"] + 1,
        options={"k": 5},
        equal_n=True,  # as for precision and recall
        floor="sizes",
        version="1, ties do not count",
    ),
    Metric(
        key="msid",
        scores=("msid",),
        generated=("features",),
        real=("features",),
        better="lower",
        value=bindings.msid_value,
        estimate=bindings.msid_estimate,
        interval=_HALVES_INTERVAL,
        source="Tsitsulin et al. 2020, arXiv:1905.11141",
        minimum=_at_least(2000),
        required=lambda options: options["k"] + 2,
        options={"k": 5},
        equal_n=True,  # the graph of a larger set has another spectrum
        floor="sizes",
    ),
    Metric(
        key="vendi",
        scores=("vendi",),
        generated=("unit",),
        better="higher",
        value=bindings.vendi_value,
        estimate=bindings.vendi_estimate,
        interval=_HALVES_INTERVAL,
        source="Friedman and Dieng 2023, arXiv:2210.02410",
        minimum=_at_least(100),
        floor="self",
    ),
    Metric(
        key="clip_t",
        scores=("clip_t",),
        generated=("unit", "texts"),
        extractor="clip",
        better="higher",
        value=bindings.text_similarity_value,
        estimate=bindings.text_similarity_estimate,
        per_image=bindings.text_similarities,
        interval=_MEAN_INTERVAL,
        source=f"{_DREAMBOOTH}; CLIP: arXiv:2103.00020",
        minimum=_at_least(10),
        per_subject=True,
        floor="self_any",  # a mean does not depend on the number of images
    ),
    Metric(
        key="clip_i",
        scores=("clip_i",),
        generated=("unit",),
        real=("unit",),
        extractor="clip",
        better="higher",
        value=bindings.image_similarity_value,
        estimate=bindings.image_similarity_estimate,
        per_image=bindings.image_similarities,
        interval=_MEAN_INTERVAL,
        source=f"{_DREAMBOOTH}; CLIP: arXiv:2103.00020",
        minimum=_at_least(4),
        minimum_real=_at_least(2),
        required=lambda options: 1,
        per_subject=True,
        floor=bindings.image_similarity_ceiling,
    ),
    Metric(
        key="dino",
        scores=("dino",),
        generated=("unit",),
        real=("unit",),
        extractor="dino",
        better="higher",
        value=bindings.image_similarity_value,
        estimate=bindings.image_similarity_estimate,
        per_image=bindings.image_similarities,
        interval=_MEAN_INTERVAL,
        source=f"{_DREAMBOOTH}; DINO: arXiv:2104.14294",
        minimum=_at_least(4),
        minimum_real=_at_least(2),
        required=lambda options: 1,
        per_subject=True,
        floor=bindings.image_similarity_ceiling,
    ),
    Metric(
        key="copy_rate",
        scores=("copy_rate",),
        generated=("unit",),
        real=("unit",),
        extractor="dino",
        better="lower",
        estimate=bindings.copy_rate_estimate,
        interval=_PROPORTION_INTERVAL,
        minimum=_at_least(10),
        minimum_real=_at_least(2),
        options={"threshold": None},
        per_subject=True,
        floor="",  # would be 0: the threshold is the nearest pair of real images
    ),
    Metric(
        key="lpips_diversity",
        scores=("lpips_diversity",),
        generated=("pixels", "groups"),
        extractor="lpips",
        better="higher",
        estimate=bindings.lpips_diversity_estimate,
        interval="Student's t over prompts (bootstrap from 30 on)",
        source=f"{_DREAMBOOTH}; LPIPS: arXiv:1801.03924",
        minimum=_at_least(4),
        per_subject=True,
        floor="self_any",
    ),
    Metric(
        key="authpct",
        scores=("authpct",),
        generated=("features",),
        train=("features",),
        better="higher",
        estimate=bindings.authpct_estimate,
        interval=_PROPORTION_INTERVAL,
        source="Alaa et al. 2022, arXiv:2102.08921",
        minimum=_at_least(100),
        minimum_real=_at_least(2),
        floor="self_any",
    ),
    Metric(
        key="fls",
        scores=("fls",),
        generated=("features",),
        real=("features",),
        train=("features",),
        better="higher",
        estimate=bindings.fls_estimate,
        interval="Student's t over test images",
        source="Jiralerspong et al. 2023, arXiv:2302.04440",
        minimum=_at_least(1000),
        floor=_as_other_training_images,
        is_extra=True,
    ),
    Metric(
        key="preference",
        scores=("preference",),
        generated=("preference",),
        extractor="preference",
        better="higher",
        estimate=bindings.preference_estimate,
        interval=_MEAN_INTERVAL,
        minimum=_at_least(10),
        floor="",  # the prompts of real images are not known
    ),
)

METRICS: dict[str, Metric] = {metric.key: metric for metric in _ALL}
