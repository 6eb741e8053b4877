"""Any diffusers pipeline by name: a folder, a hub name, an embedded model or a single checkpoint file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from torch import nn

from diffadapt.common.pipeline_components import AUTOENCODER, DENOISERS
from diffadapt.models.base import BaseModel
from diffadapt.models.base_names import looks_local, pipeline_class, pipeline_index, resolve
from diffadapt.models.denoiser_loading import load_denoiser
from diffadapt.models.families import family_of_pipeline, freeze
from diffadapt.models.single_file import is_single_file, open_single_file


def open_pipeline(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    prediction_type: str | None = None,
    safety_checker: bool = True,
    base_precision: str | None = None,
    transformer: str | None = None,
    components: Mapping[str, object] | None = None,
) -> DiffusionPipeline:
    """The pipeline on the CPU: its autoencoder in float32, since some overflow in half, all else in `dtype`.

    The arguments are those of `families.load_base`, and

    Args:
        components: by name, to use instead of loading them from a folder or from the hub.

    Raises:
        OSError, ValueError: there is no pipeline of that name; the message has the remedy.
    """
    class_name = pipeline_class(name, revision=revision)
    path = resolve(name)
    is_loaded_apart = base_precision is not None or transformer is not None
    if is_single_file(path):
        if is_loaded_apart:
            raise ValueError(
                f"{name} is a single file, whose denoiser is neither quantised nor replaced; give the folder "
                "or hub name of the pipeline"
            )
        pipe = _pipeline_from_file(path, dtype)
    else:
        family = family_of_pipeline(class_name)
        pipeline_type = DiffusionPipeline if family is None else family.pipeline_type(class_name)
        replaced: dict[str, object] = {}
        if family is not None:
            replaced |= _absent_components(family, pipeline_index(name, revision=revision))
            if not safety_checker:
                replaced |= family.without_safety_checker
        replaced |= dict(components or {})
        if is_loaded_apart and replaced.keys().isdisjoint(DENOISERS):
            replaced |= load_denoiser(
                name,
                dtype=dtype,
                base_precision=base_precision,
                file=transformer,
                revision=revision,
                variant=variant,
            )
        pipe = pipeline_type.from_pretrained(
            path,
            # SDXL's autoencoder overflows in float16.
            dtype={"default": dtype, AUTOENCODER: torch.float32},
            revision=revision,
            variant=variant,
            use_safetensors=True,  # no pickled weights
            **replaced,
        )
    if vae is not None:
        replacement = open_autoencoder(vae)
        _check_same_latents(replacement, pipe, vae)
        pipe.register_modules(vae=replacement)
    if prediction_type is not None:
        scheduler = pipe.scheduler
        pipe.scheduler = type(scheduler).from_config(scheduler.config, prediction_type=prediction_type)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_frozen_pipeline(
    name: str,
    *,
    device: str = "cpu",
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    prediction_type: str | None = None,
    base_precision: str | None = None,
    transformer: str | None = None,
) -> DiffusionPipeline:
    """A pipeline of any kind to sample with, its safety checker included. Raises: as `open_pipeline`."""
    pipe = open_pipeline(
        name,
        revision=revision,
        variant=variant,
        vae=vae,
        prediction_type=prediction_type,
        base_precision=base_precision,
        transformer=transformer,
    )
    pipe.to(device)
    freeze(pipe.components)
    return pipe


def _absent_components(family: type[BaseModel], index: Mapping[str, object]) -> dict[str, None]:
    """Arguments of `from_pretrained` for the components that a pipeline was saved without."""
    absent = {}
    for component in family.left_out_where_absent:
        if index.get(component) in (None, [None, None]):
            absent[component] = None
    return absent


def _pipeline_from_file(path: str, dtype: torch.dtype) -> DiffusionPipeline:
    pipe = open_single_file(path)
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module) and name != AUTOENCODER:
            component.to(dtype)
    return pipe


def open_autoencoder(name: str) -> AutoencoderKL | AutoencoderTiny:
    """An autoencoder in float32: its folder or hub name, a pipeline's folder, or a single file.

    Raises:
        OSError: none was found; the message says what was tried.
        ValueError: it is of another class.
    """
    path = resolve(name)
    if is_single_file(path):
        if not Path(path).is_file():
            raise FileNotFoundError(f"no autoencoder at {name!r}")
        return AutoencoderKL.from_single_file(path, torch_dtype=torch.float32)
    if looks_local(path) and not Path(path).exists():
        raise FileNotFoundError(f"no autoencoder at {name!r}; give a diffusers folder or a hub name")
    location = {}
    if (Path(path) / AUTOENCODER).is_dir():  # a pipeline's folder
        location["subfolder"] = AUTOENCODER
    class_name = AutoencoderKL.load_config(path, **location).get("_class_name")
    classes = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    if class_name not in classes:
        raise ValueError(f"{name!r} is a {class_name}; an autoencoder is one of {', '.join(classes)}")
    return classes[class_name].from_pretrained(path, dtype=torch.float32, use_safetensors=True, **location)


def _check_same_latents(
    replacement: AutoencoderKL | AutoencoderTiny, pipe: DiffusionPipeline, name: str
) -> None:
    """Raises ValueError where another autoencoder's latents do not have the shape of the base's own."""
    current = getattr(pipe, AUTOENCODER, None)
    if current is None:
        raise ValueError(f"{type(pipe).__name__} has no autoencoder that {name!r} could replace")
    channels, factor = _latent_shape(replacement)
    base_channels, base_factor = _latent_shape(current)
    if (channels, factor) != (base_channels, base_factor):
        raise ValueError(
            f"{name!r} makes latents of {channels} channels, {factor} times smaller than the image; "
            f"the base works with {base_channels} channels, {base_factor} times smaller"
        )


def _latent_shape(vae: AutoencoderKL | AutoencoderTiny) -> tuple[int, int]:
    """Channels of the latents, and how many times smaller they are than the image."""
    levels = len(vae.config.block_out_channels)
    return vae.config.latent_channels, 2 ** (levels - 1)
