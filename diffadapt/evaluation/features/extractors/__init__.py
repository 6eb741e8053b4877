"""Extractors by name: `load_extractor("inception")`, `load_extractor("clip:FOLDER")`, ...

`base.py` says what an extractor must offer and how to add one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from diffadapt.common.messages import did_you_mean
from diffadapt.evaluation.features import weight_files
from diffadapt.evaluation.features.extractors.base import Extractor
from diffadapt.evaluation.features.extractors.convolutional import LPIPS_BACKBONES, inception, lpips, vgg16
from diffadapt.evaluation.features.extractors.custom import custom
from diffadapt.evaluation.features.extractors.digits import digits
from diffadapt.evaluation.features.extractors.transformer import clip, dino
from diffadapt.evaluation.features.hub_models import model_folder
from diffadapt.metrics.resize import check_preset

__all__ = ["EMBEDDED", "NAMES", "Extractor", "available", "canonical", "load_extractor"]

EMBEDDED = ("embedded:clip", "embedded:digits")
NAMES = ("inception", "vgg16", *(f"lpips:{backbone}" for backbone in LPIPS_BACKBONES), *EMBEDDED)
DEFAULT_MODELS = {  # the models that `clip`, `dino` and `dinov2` alone stand for
    "clip": "openai/clip-vit-base-patch32",
    "dino": "facebook/dino-vits16",
    "dinov2": "facebook/dinov2-small",
}
MODEL_NAMES = [f"{kind}:MODEL" for kind in DEFAULT_MODELS]  # for messages
RANDOM = "random weights"  # recorded in the place of a hash


def canonical(name: str) -> str:
    """The full name of an extractor.

    `clip`, `dino` and `dinov2` get their default models; `clip:embedded:clip` is `embedded:clip`.
    """
    name = name.strip()
    if name in DEFAULT_MODELS:
        return f"{name}:{DEFAULT_MODELS[name]}"
    return name.removeprefix("clip:") if name.startswith("clip:embedded:") else name


def weights_by_extractor(pairs: Sequence[str]) -> dict[str, Path]:
    """Parses `--weights`: `["dino=FOLDER", "inception=FILE"]` to paths by the extractors' full names.

    Raises:
        ValueError: a pair is of another form, or no extractor with weights has this name.
        FileNotFoundError: there is no such path.
    """
    paths: dict[str, Path] = {}
    for name, path in weight_files.parse_weights(pairs).items():
        full_name = canonical(name)
        if not _takes_weights(full_name):
            suggestion = did_you_mean(name, [*weight_files.FILES, *DEFAULT_MODELS, *MODEL_NAMES])
            raise ValueError(f"--weights {name}={path}: {name!r} takes no weights{suggestion}")
        paths[full_name] = path
    return paths


def available(weights: Mapping[str, Path] | None = None) -> list[str]:
    """Extractors with published weights that can be used without a download.

    Args:
        weights: parsed `--weights`.
    """
    names = []
    for name in weight_files.FILES:
        if name in (weights or {}) or weight_files.find(name):
            names.append(name)
    return [*sorted(names), *EMBEDDED]


def load_extractor(
    name: str,
    *,
    weights: Mapping[str, Path] | None = None,
    preset: str | None = None,
    device: str = "cpu",
    download: bool = False,
    smoke: bool = False,
) -> Extractor:
    """The extractor of a name, ready to use.

    Args:
        name: inception, vgg16, lpips:alex|vgg|squeeze, clip:MODEL, dino:MODEL, dinov2:MODEL (a folder or a
            name on the hub), embedded:clip, embedded:digits, or module:Class.
        weights: full name -> weight file or folder; the usual caches are searched for others.
        preset: of the resize; None: the extractor's default.
        device: of the network.
        download: whether missing weights may be downloaded.
        smoke: random weights for inception, vgg16 and lpips, to try a command: NOT A SCORE.

    Raises:
        ValueError: the name is unknown, a hash is wrong, or a folder holds another type of model.
        FileNotFoundError: weights are missing, with the remedies.
    """
    name = canonical(name)
    weights = weights or {}
    if preset is not None:
        check_preset(preset, 1)  # before any weights are searched for
    if name in weight_files.FILES:
        extractor = _from_weight_file(
            name, weights, preset=preset, device=device, download=download, smoke=smoke
        )
    elif smoke and name not in EMBEDDED:
        raise ValueError(
            f"--smoke draws random weights for {', '.join(weight_files.FILES)}, not for {name!r}"
        )
    else:
        extractor = _from_model(name, weights, preset=preset, device=device, download=download)
    check_preset(extractor.preset, extractor.side)
    return extractor


def _takes_weights(full_name: str) -> bool:
    kind, _, model = full_name.partition(":")
    return full_name in weight_files.FILES or (kind in DEFAULT_MODELS and model != "")


def _from_model(
    name: str, weights: Mapping[str, Path], *, preset: str | None, device: str, download: bool
) -> Extractor:
    """An extractor from a folder, a name on the hub, the package, or a user's module."""
    kind, _, model = name.partition(":")
    if name == "embedded:digits":
        return digits(preset=preset, device=device)
    if name == "embedded:clip" or (kind in DEFAULT_MODELS and model):
        folder = model_folder(
            name if kind == "embedded" else model,
            weights=weights,
            extractor=name,
            download=download,
            available=available(weights),
        )
        build = dino if kind in ("dino", "dinov2") else clip
        return build(name, folder, preset=preset, device=device)
    top_package = kind.partition(".")[0]
    if model and kind != "embedded" and importlib.util.find_spec(top_package) is not None:
        return custom(name, preset=preset, device=device)
    valid_names = [*NAMES, *MODEL_NAMES, "module:Class"]
    raise ValueError(f"unknown extractor {name!r}{did_you_mean(name, valid_names)}")


def _from_weight_file(
    name: str,
    weights: Mapping[str, Path],
    *,
    preset: str | None,
    device: str,
    download: bool,
    smoke: bool,
) -> Extractor:
    """An extractor with a published weight file, or with random weights."""
    kind, _, backbone = name.partition(":")
    build = {"inception": inception, "vgg16": vgg16, "lpips": lpips}[kind]
    options = {"preset": preset, "device": device}
    if backbone:
        options["backbone"] = backbone
    if smoke:
        # the same numbers every time, and none taken from the caller's generator
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build(None, sha256=RANDOM, **options)
    path = weight_files.locate(name, weights=weights, download=download, available=available(weights))
    sha256 = weight_files.check(path, weight_files.FILES[name])
    return build(path, sha256=sha256, **options)
