"""Any diffusers pipeline by name: a folder, a hub name, an embedded model or a single checkpoint file."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import nn

from diffadapt.models import sd
from diffadapt.models.names import FAMILIES, resolve


def open_pipeline(name: str, *, revision: str | None = None, variant: str | None = None) -> DiffusionPipeline:
    """The pipeline in float32 on the CPU. Raises FileNotFoundError when a local name is not there."""
    place = resolve(name)
    if place.endswith(".safetensors"):
        return open_single_file(place)
    looks_local = place.startswith((".", "~", "/")) or place.count("/") > 1
    if looks_local and not Path(place).exists():
        raise FileNotFoundError(f"no base model at {name!r}; give a diffusers folder or a hub name")
    pipe = DiffusionPipeline.from_pretrained(place, revision=revision, variant=variant)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_base(
    name: str, *, device: str = "cpu", revision: str | None = None, variant: str | None = None
) -> DiffusionPipeline:
    """A pipeline to draw with. Raises an error with the remedy when there is none of that name."""
    if not name.endswith(".safetensors") and _pipeline_class(name) in FAMILIES:
        return sd.load(name, device=device, revision=revision, variant=variant, safety_checker=True).pipe
    pipe = open_pipeline(name, revision=revision, variant=variant).to(device)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    return pipe


def _pipeline_class(name: str) -> str | None:
    """The class named in a local folder; None for a hub name or a folder without an index."""
    index = Path(resolve(name)) / "model_index.json"
    return json.loads(index.read_text()).get("_class_name") if index.is_file() else None


def open_single_file(path: str) -> DiffusionPipeline:
    """A whole checkpoint in one file. Its layout is known from its keys; its configuration and tokenizer come
    from the hub's folder of that family, or from a ``config`` folder of the same name beside the file."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from safetensors import safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    with safe_open(path, framework="pt") as file:
        is_xl = any(key.startswith("conditioner.embedders.1") for key in file.keys())  # noqa: SIM118
    family = StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline
    beside = Path(path).with_suffix("")
    config = {"config": str(beside), "local_files_only": True} if beside.is_dir() else {}
    try:
        return family.from_single_file(path, **config)
    except (OSError, ValueError) as error:
        raise OSError(
            f"{path}: a single file has no configuration or tokenizer; without a network, put the pipeline's "
            f"folder without weights (model_index.json, every config.json, tokenizer) at {beside} ({error})"
        ) from error
