"""The families of base models: one line each, and the functions that find and load a base by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from diffadapt.adapters.architectures import register_architecture
from diffadapt.common.pipeline_components import AUTOENCODER
from diffadapt.models.base import BaseModel, BaseProfile
from diffadapt.models.base_names import EMBEDDED, is_embedded, pipeline_class, resolve
from diffadapt.models.chroma import Chroma
from diffadapt.models.dit import DiT
from diffadapt.models.flux import Flux
from diffadapt.models.flux2 import Flux2Dev, Flux2Klein
from diffadapt.models.from_config import denoiser_from_config, models_from_config
from diffadapt.models.krea2 import Krea2
from diffadapt.models.pixart import PixArtSigma
from diffadapt.models.placement import Placement
from diffadapt.models.qwen_image import QwenImage
from diffadapt.models.sd import StableDiffusion
from diffadapt.models.sd3 import StableDiffusion3
from diffadapt.models.sdxl import StableDiffusionXL
from diffadapt.models.single_file import is_single_file
from diffadapt.models.unet2d import UNet2D
from diffadapt.models.z_image import ZImage

FAMILIES: dict[str, type[BaseModel]] = {}  # by name


def register_family(family: type[BaseModel]) -> None:
    """Makes a family known to loading, attaching and exporting."""
    FAMILIES[family.family] = family
    register_architecture(family.describe_architecture)


# A new family is one more line here.
register_family(StableDiffusion)
register_family(StableDiffusionXL)
register_family(UNet2D)
register_family(DiT)
register_family(StableDiffusion3)
register_family(Flux)
register_family(ZImage)
register_family(Flux2Klein)
register_family(Flux2Dev)
register_family(QwenImage)
register_family(Krea2)
register_family(Chroma)
register_family(PixArtSigma)


def family_of_pipeline(class_name: str) -> type[BaseModel] | None:
    """The family of a pipeline's class, as model_index.json names it; None for an unknown one."""
    for family in FAMILIES.values():
        if class_name in family.pipeline_classes:
            return family
    return None


def profiles() -> dict[str, BaseProfile]:
    """Every profile by its name: of families, and of embedded bases."""
    by_name = {}
    for family in FAMILIES.values():
        for profile in (family.profile_of_family, *family.embedded_profiles.values()):
            by_name[profile.name] = profile
    return by_name


def profile_of(name: str, *, revision: str | None = None) -> BaseProfile:
    """What suits a base of that name. A value tuned on an embedded base never reaches another base.

    Raises:
        OSError: there is no such base.
        ValueError: its kind is unknown.
    """
    family = _family_of(name, revision)
    embedded_name = name.removeprefix(EMBEDDED)
    if is_embedded(name) and embedded_name in family.embedded_profiles:
        return family.embedded_profiles[embedded_name]
    return family.profile_of_family


def sampling_defaults(name: str, *, revision: str | None = None) -> Mapping[str, object]:
    """Default values of the sampling options; those of Stable Diffusion for a pipeline of an unknown kind."""
    if family_of_pipeline(pipeline_class(name, revision=revision)) is None:
        return StableDiffusion.profile_of_family.defaults
    return profile_of(name, revision=revision).defaults


def load_base(
    name: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    prediction_type: str | None = None,
    safety_checker: bool = False,
    base_precision: str | None = None,
    transformer: str | None = None,
    is_staged: bool = False,
    is_shapes_only: bool = False,
    text_encoder_device: torch.device | str | None = None,
    resident_blocks: int | None = None,
) -> BaseModel:
    """Loads a base, frozen: denoiser and text encoders in `dtype`, the autoencoder always in float32.

    Args:
        name: a diffusers folder, a hub name, a single `.safetensors` checkpoint or `embedded:NAME`.
        device: of every component; with `is_staged` the one to which `BaseModel.placement` brings them.
        dtype: of denoiser and text encoders.
        revision: branch, tag or commit on the hub.
        variant: of the base's files, such as fp16.
        vae: another autoencoder in place of the base's own: folder, hub name or `.safetensors` file.
        prediction_type: epsilon, v_prediction or sample, in place of what the base's scheduler says.
        safety_checker: keep the one of a Stable Diffusion pipeline.
        base_precision: nf4, int8 or fp8: quantises the Linear layers in the blocks of the denoiser.
        transformer: a `.gguf` or `.safetensors` file with the denoiser's weights, in place of the base's own
            and as it is stored.
        is_staged: leave everything in main memory for now. The denoiser of a base that samples from encoded
            captions has only shapes until `Placement.load_denoiser`.
        is_shapes_only: with `is_staged`, load no weights of a base that samples from encoded captions: all
            its models are on the meta device.
        text_encoder_device: with `is_staged`, the one on which text encoders compute; None for `device`.
        resident_blocks: with `is_staged`, how many of the denoiser's blocks are on `device` at a time; None
            for all.

    Raises:
        OSError, ValueError: there is no such base at `name`; the message says what was expected.
    """
    from diffadapt.models.open_pipeline import open_pipeline  # imports diffusers, which takes seconds

    family = _family_of(name, revision)
    open_base = partial(
        open_pipeline,
        name,
        dtype=dtype,
        revision=revision,
        variant=variant,
        base_precision=base_precision,
        transformer=transformer,
    )
    is_in_parts = is_staged and family.samples_from_states and not is_single_file(resolve(name))
    is_shapes_only = is_shapes_only and is_in_parts
    is_denoiser_later = is_in_parts and not is_shapes_only
    shapes = {}
    if is_shapes_only:
        for component, module in models_from_config(name, revision=revision).items():
            shapes[component] = module if component == AUTOENCODER else module.to(dtype)
    elif is_denoiser_later:
        denoiser_name, denoiser = denoiser_from_config(name, revision=revision)
        shapes[denoiser_name] = denoiser.to(dtype)
    pipe = open_base(
        vae=vae, prediction_type=prediction_type, safety_checker=safety_checker, components=shapes
    )
    if not is_staged:
        pipe.to(device)
    if is_shapes_only and vae is not None:
        pipe.vae.to("meta")
    freeze(pipe.components)
    absent = [component for component, value in pipe.components.items() if value is None]
    required = [component for component in absent if component not in family.optional_components]
    if required:
        raise ValueError(f"{name} has no {', '.join(required)}; give the folder of a whole pipeline")
    model = family(pipe, name, profile_of(name, revision=revision))

    def load_denoiser() -> nn.Module:
        others = {component: value for component, value in pipe.components.items() if component not in shapes}
        loaded = open_base(components=others)
        freeze(loaded.components)
        return getattr(loaded, denoiser_name)

    model.placement = Placement(
        pipe,
        torch.device(device),
        text_encoder_device=None if text_encoder_device is None else torch.device(text_encoder_device),
        resident_blocks=resident_blocks,
        load_denoiser=load_denoiser if is_denoiser_later else None,
        is_staged=is_staged and not is_shapes_only,
    )
    return model


def freeze(components: Mapping[str, object]) -> None:
    """Puts a pipeline's models into evaluation mode, without gradients."""
    for component in components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()


def _family_of(name: str, revision: str | None) -> type[BaseModel]:
    class_name = pipeline_class(name, revision=revision)
    family = family_of_pipeline(class_name)
    if family is None:
        supported: list[str] = []
        for supported_family in FAMILIES.values():
            supported += supported_family.pipeline_classes
        raise ValueError(f"{name!r} is a {class_name}; the known kinds are {', '.join(supported)}")
    return family
