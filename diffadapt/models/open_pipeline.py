"""Any diffusers pipeline by name: a folder, a hub name, an embedded model or a single checkpoint file."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from torch import nn

from diffadapt.models.base_names import looks_local, pipeline_class, resolve
from diffadapt.models.single_file import is_single_file, open_single_file
from diffadapt.pipelines import ClassConditionalPipeline, DiTPipeline


def open_pipeline(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    prediction_type: str | None = None,
    safety_checker: bool = True,
) -> DiffusionPipeline:
    """The pipeline on the CPU: its autoencoder in float32, since some overflow in half, all else in `dtype`.

    Args: as of `families.load_base`.
    Raises: OSError or ValueError with the remedy when there is no pipeline of that name.
    """
    kind = pipeline_class(name, revision=revision)
    place = resolve(name)
    if is_single_file(place):
        pipe = _from_file(place, dtype)
    else:
        without = {} if safety_checker or kind != "StableDiffusionPipeline" else _UNCHECKED
        opener = _OWN_PIPELINES.get(kind, DiffusionPipeline)
        pipe = opener.from_pretrained(
            place,
            dtype={"default": dtype, "vae": torch.float32},
            revision=revision,
            variant=variant,
            use_safetensors=True,  # no pickled weights
            **without,
        )
    if vae is not None:
        pipe.register_modules(vae=_fitting(open_autoencoder(vae), pipe, vae))
    if prediction_type is not None:
        own = pipe.scheduler
        pipe.scheduler = type(own).from_config(own.config, prediction_type=prediction_type)
    pipe.set_progress_bar_config(disable=True)
    return pipe


_OWN_PIPELINES = {  # in place of what diffusers finds, or where it finds none
    "ClassConditionalPipeline": ClassConditionalPipeline,
    "DiTPipeline": DiTPipeline,
}
_UNCHECKED = {"safety_checker": None, "requires_safety_checker": False}


def _from_file(place: str, dtype: torch.dtype) -> DiffusionPipeline:
    pipe = open_single_file(place)
    for component in pipe.components.values():
        if isinstance(component, nn.Module) and component is not getattr(pipe, "vae", None):
            component.to(dtype)
    return pipe


def open_autoencoder(name: str) -> AutoencoderKL | AutoencoderTiny:
    """An autoencoder in float32: its folder or hub name, a pipeline's folder, or a single file.

    Raises: OSError with what was tried.
    """
    place = resolve(name)
    if is_single_file(place):
        if not Path(place).is_file():
            raise FileNotFoundError(f"no autoencoder at {name!r}")
        return AutoencoderKL.from_single_file(place, torch_dtype=torch.float32)
    if looks_local(place) and not Path(place).exists():
        raise FileNotFoundError(f"no autoencoder at {name!r}; give a diffusers folder or a hub name")
    inside = {"subfolder": "vae"} if (Path(place) / "vae").is_dir() else {}
    config = AutoencoderKL.load_config(place, **inside)
    kinds = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny)}
    if config.get("_class_name") not in kinds:
        raise ValueError(
            f"{name!r} is a {config.get('_class_name')}; an autoencoder is one of {', '.join(kinds)}"
        )
    kind = kinds[config["_class_name"]]
    return kind.from_pretrained(place, dtype=torch.float32, use_safetensors=True, **inside)


def _fitting(vae: AutoencoderKL | AutoencoderTiny, pipe: DiffusionPipeline, name: str) -> nn.Module:
    """The autoencoder, when its latents have the shape of the base's own. Raises: ValueError otherwise."""
    own = getattr(pipe, "vae", None)
    if own is None:
        raise ValueError(f"{type(pipe).__name__} has no autoencoder that {name!r} could replace")
    shapes = [(m.config.latent_channels, 2 ** (len(m.config.block_out_channels) - 1)) for m in (vae, own)]
    if shapes[0] != shapes[1]:
        (channels, factor), (own_channels, own_factor) = shapes
        raise ValueError(
            f"{name!r} makes latents of {channels} channels, {factor} times smaller than the picture; "
            f"the base works with {own_channels} channels, {own_factor} times smaller"
        )
    return vae


def open_frozen_pipeline(
    name: str,
    *,
    device: str = "cpu",
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    prediction_type: str | None = None,
) -> DiffusionPipeline:
    """A pipeline of any kind to draw with. Raises: as `open_pipeline`."""
    pipe = open_pipeline(
        name, revision=revision, variant=variant, vae=vae, prediction_type=prediction_type
    ).to(device)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    return pipe
