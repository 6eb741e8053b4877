"""Figures of generated images: pure functions on features, their intervals, and the registry of them all."""

from diffadapt.metrics.authenticity import authpct
from diffadapt.metrics.clip import clip_score
from diffadapt.metrics.copying import copy_rate, nearest_images
from diffadapt.metrics.diversity import lpips_diversity
from diffadapt.metrics.evaluate import Evaluation, evaluate
from diffadapt.metrics.feature_set import FeatureSet
from diffadapt.metrics.frechet import Statistics, fid, fid_infinity
from diffadapt.metrics.frechet_statistics import read_statistics
from diffadapt.metrics.inception_score import inception_score, is_gap
from diffadapt.metrics.intervals import Estimate, Interval
from diffadapt.metrics.kernel import cmmd, kid, kid_subsets
from diffadapt.metrics.likelihood import fls
from diffadapt.metrics.manifold import density_coverage, precision_recall, realism
from diffadapt.metrics.msid import msid
from diffadapt.metrics.naming import score_name
from diffadapt.metrics.registry import METRICS
from diffadapt.metrics.sample_size import TooFewImages
from diffadapt.metrics.vendi import vendi

Inputs = FeatureSet  # its earlier name

__all__ = [
    "METRICS",
    "Estimate",
    "Evaluation",
    "FeatureSet",
    "Inputs",
    "Interval",
    "Statistics",
    "TooFewImages",
    "authpct",
    "clip_score",
    "cmmd",
    "copy_rate",
    "density_coverage",
    "evaluate",
    "fid",
    "fid_infinity",
    "fls",
    "inception_score",
    "is_gap",
    "kid",
    "kid_subsets",
    "lpips_diversity",
    "msid",
    "nearest_images",
    "precision_recall",
    "read_statistics",
    "realism",
    "score_name",
    "vendi",
]
