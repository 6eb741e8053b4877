"""The same evaluation by torch-fidelity and by diffadapt, on the same images and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch_fidelity
import torchvision
from PIL import Image

from diffadapt.evaluation.features.extraction import extract
from diffadapt.evaluation.features.extractors import Extractor
from diffadapt.evaluation.features.extractors.convolutional import Inception, inception, vgg16
from diffadapt.evaluation.scored_set import scored_set_from_images
from diffadapt.evaluation.scoring import Plan, score_set
from diffadapt.evaluation.sets.image_sets import open_set

BATCH = 32
ON_POOL = ("inception_score", "fid", "kid_subsets")  # always Inception's
NAMES = {  # torch-fidelity's name -> ours
    "inception_score_mean": "inception_score",
    "frechet_inception_distance": "fid",
    "kernel_inception_distance_mean": "kid_subsets",
    "precision": "precision",
    "recall": "recall",
}


@dataclass(frozen=True)
class Setup:
    """Two folders of images, the weight files of both networks, the networks, the size of KID's subsets."""

    generated: str
    real: str
    files: Mapping[str, Path]
    extractors: Mapping[str, Extractor]
    subset: int


def prepare(folder: Path, count: int, side: int, manifolds: Sequence[str]) -> Setup:
    """Random smooth images and random weights; both programs get the same files.

    Args:
        manifolds: networks of precision and recall; Inception is always there.
    """
    for index, name in enumerate(("generated", "real")):
        (folder / name).mkdir()
        generator = np.random.default_rng(index)
        for number in range(count):
            small = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            small.resize((side, side), Image.Resampling.BICUBIC).save(folder / name / f"{number:05d}.png")
    torch.manual_seed(0)
    networks = {"inception": Inception(None)}
    if "vgg16" in manifolds:
        networks["vgg16"] = torchvision.models.vgg16(weights=None)
    files = {name: folder / f"{name}.pth" for name in networks}
    for name, network in networks.items():
        torch.save(network.state_dict(), files[name])
    options = {"sha256": "random", "preset": None, "device": "cpu"}
    builders = {"inception": inception, "vgg16": vgg16}
    extractors = {name: builders[name](files[name], **options) for name in networks}
    return Setup(str(folder / "generated"), str(folder / "real"), files, extractors, min(1000, count // 2))


def fidelity(setup: Setup, manifold: str) -> dict[str, float]:
    """torch-fidelity: one call where one network serves all metrics, else its two passes.

    Args:
        manifold: the network of precision and recall, "inception" or "vgg16".
    """
    common = {"input1": setup.generated, "input2": setup.real, "cuda": False, "cache": False}
    common |= {"batch_size": BATCH, "kid_subset_size": setup.subset, "verbose": False}
    pool = {
        "isc": True,
        "fid": True,
        "kid": True,
        **_network("inception-v3-compat", setup.files["inception"]),
    }
    if manifold == "inception":
        return torch_fidelity.calculate_metrics(**common, **pool, prc=True)
    found = torch_fidelity.calculate_metrics(**common, **pool)
    vgg = _network("vgg16", setup.files["vgg16"])
    return found | torch_fidelity.calculate_metrics(**common, **vgg, prc=True)


def ours(setup: Setup, manifold: str) -> dict[str, float]:
    """The same numbers; every image is decoded once for all networks."""
    plans = {"inception": ON_POOL}
    plans[manifold] = (*plans.get(manifold, ()), "precision_recall")
    extractors = [setup.extractors[name] for name in plans]
    materials = []
    for folder, role in ((setup.generated, "generated"), (setup.real, "real")):
        images = open_set(folder)
        made = extract(images, extractors, batch_size=BATCH, title=role)
        materials.append(scored_set_from_images(images, made, extractors, role=role))
    options = {"kid_subsets": {"size": setup.subset}}
    found = {}
    for name, metrics in plans.items():
        plan = Plan(metrics, options, allow_small=True, intervals=False, floor=False)
        scored = score_set("generated", *materials, setup.extractors[name], plan)
        found |= {str(score.identity["score"]): score.value for score in scored.scores}
    return found


def difference(theirs: Mapping[str, float], own: Mapping[str, float]) -> float:
    """The largest relative difference of the values that both give."""
    pairs = ((theirs[name], own[our_name]) for name, our_name in NAMES.items())
    return max(abs(a - b) / max(abs(a), 1e-3) for a, b in pairs)


def _network(name: str, weights: Path) -> dict[str, object]:
    return {"feature_extractor": name, "feature_extractor_weights_path": str(weights)}
