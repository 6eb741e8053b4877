"""Extractors by name: `load_extractor("inception")`, `load_extractor("clip:FOLDER")`, ..."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from diffadapt.common.messages import did_you_mean
from diffadapt.evaluation.features import weight_files
from diffadapt.evaluation.features.extractors.base import Extractor
from diffadapt.evaluation.features.extractors.convolutional import LPIPS, inception, lpips, vgg16
from diffadapt.evaluation.features.extractors.custom import custom
from diffadapt.evaluation.features.extractors.digits import digits
from diffadapt.evaluation.features.extractors.transformer import clip, dino
from diffadapt.evaluation.features.hub_models import folder_of
from diffadapt.metrics.resize import check_preset

__all__ = ["EMBEDDED", "NAMES", "Extractor", "available", "canonical", "load_extractor"]

EMBEDDED = ("embedded:clip", "embedded:digits")
NAMES = ("inception", "vgg16", *(f"lpips:{kind}" for kind in LPIPS), *EMBEDDED)
DEFAULT_MODELS = {  # what `clip`, `dino` and `dinov2` alone stand for
    "clip": "openai/clip-vit-base-patch32",
    "dino": "facebook/dino-vits16",
    "dinov2": "facebook/dinov2-small",
}
RANDOM = "random weights"  # stands in the place of a hash


def canonical(name: str) -> str:
    """The full name of `clip`, `dino` and `dinov2`; `clip:embedded:clip` is `embedded:clip`."""
    name = name.strip()
    if name in DEFAULT_MODELS:
        return f"{name}:{DEFAULT_MODELS[name]}"
    return name.removeprefix("clip:") if name.startswith("clip:embedded:") else name


def weights_by_extractor(pairs: Sequence[str]) -> dict[str, Path]:
    """`["dino=FOLDER", "inception=FILE"]` -> paths by the full names of their extractors.

    Raises: what `parse_weights` raises, and ValueError for a name that no extractor with weights has.
    """
    found: dict[str, Path] = {}
    for name, path in weight_files.parse_weights(pairs).items():
        full = canonical(name)
        kind, _, model = full.partition(":")
        if full not in weight_files.FILES and not (kind in DEFAULT_MODELS and model):
            known = [*weight_files.FILES, *DEFAULT_MODELS, *(f"{kind}:MODEL" for kind in DEFAULT_MODELS)]
            raise ValueError(f"--weights {name}={path}: {name!r} takes no weights{did_you_mean(name, known)}")
        found[full] = path
    return found


def available(given: Mapping[str, Path] | None = None) -> list[str]:
    """Extractors of known weights that need nothing more on this machine."""
    files = [name for name in weight_files.FILES if name in (given or {}) or weight_files.find(name)]
    return [*sorted(files), *EMBEDDED]


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
        weights: files or folders given for some of them.
        preset: of the resize, instead of the extractor's own.
        download: whether missing weights may be fetched.
        smoke: random weights for inception, vgg16 and lpips, to try a command: NOT A SCORE.
    Raises: ValueError for an unknown name, a wrong hash or a wrong kind of model; FileNotFoundError for
        missing weights, with the remedies.
    """
    name, given = canonical(name), weights or {}
    if preset is not None:
        check_preset(preset, 1)  # before any weights are looked for
    extractor = _built(name, given, preset=preset, device=device, download=download, smoke=smoke)
    check_preset(extractor.preset, extractor.side)
    return extractor


def _built(
    name: str, given: Mapping[str, Path], *, preset: str | None, device: str, download: bool, smoke: bool
) -> Extractor:
    if name in weight_files.FILES:
        return _of_weight_file(name, given, preset=preset, device=device, download=download, smoke=smoke)
    if smoke and name not in EMBEDDED:
        raise ValueError(
            f"--smoke draws random weights for {', '.join(weight_files.FILES)}, not for {name!r}"
        )
    return _of_model(name, given, preset=preset, device=device, download=download)


def _of_model(
    name: str, given: Mapping[str, Path], *, preset: str | None, device: str, download: bool
) -> Extractor:
    """Of a folder, a hub name, the package or one's own module."""
    kind, _, model = name.partition(":")
    options = {"preset": preset, "device": device}
    if name == "embedded:digits":
        return digits(**options)
    if name == "embedded:clip" or (kind in DEFAULT_MODELS and model):
        wanted = {"given": given, "extractor": name, "download": download, "available": available(given)}
        folder = folder_of(name if kind == "embedded" else model, **wanted)
        return (dino if kind in ("dino", "dinov2") else clip)(name, folder, **options)
    if model and kind != "embedded" and importlib.util.find_spec(kind.partition(".")[0]) is not None:
        return custom(name, **options)
    known = [*NAMES, *(f"{kind}:MODEL" for kind in DEFAULT_MODELS), "module:Class"]
    raise ValueError(f"unknown extractor {name!r}{did_you_mean(name, known)}")


def _of_weight_file(
    name: str, given: Mapping[str, Path], *, preset: str | None, device: str, download: bool, smoke: bool
) -> Extractor:
    kind, _, backbone = name.partition(":")
    build = {"inception": inception, "vgg16": vgg16, "lpips": lpips}[kind]
    options = {"preset": preset, "device": device, **({"kind": backbone} if backbone else {})}
    if smoke:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build(None, sha256=RANDOM, **options)
    path = weight_files.locate(name, given=given, download=download, available=available(given))
    return build(path, sha256=weight_files.check(path, weight_files.FILES[name]), **options)
