"""The families of base models: which a name belongs to, what fits it when nothing is said, loading it."""

from __future__ import annotations

import torch
from torch import nn

from diffadapt.models import dit, sd, sdxl, unet2d
from diffadapt.models.base_names import EMBEDDED, FAMILIES, is_embedded, pipeline_class
from diffadapt.models.open_pipeline import open_pipeline

BASES = {  # family -> class of a loaded base
    "sd": sd.StableDiffusion,
    "sdxl": sdxl.StableDiffusionXL,
    "unet2d": unet2d.UNet2D,
    "dit": dit.DiT,
}
OPTIONAL_PARTS = frozenset(("safety_checker", "feature_extractor", "image_encoder"))  # of a pipeline
# Values for options that were not given. What was tuned on an embedded base never reaches another base.
DEFAULTS = {**sd.DEFAULTS, **sdxl.DEFAULTS, **unet2d.DEFAULTS, **dit.DEFAULTS}
# Ranks and learning rates that were tried on a base; other methods bring their own.
TUNED = {**sd.TUNED, **sdxl.TUNED, **unet2d.TUNED, **dit.TUNED}

Base = sd.StableDiffusion | sdxl.StableDiffusionXL | unet2d.UNet2D | dit.DiT


def family_of(name: str, *, revision: str | None = None) -> str:
    """The key of DEFAULTS for a base: an embedded base's own name, else the kind of its pipeline.

    Raises: OSError when there is no such base, ValueError when it is of an unknown kind.
    """
    kind = _kind_of(name, revision)
    own = name.removeprefix(EMBEDDED)
    return own if is_embedded(name) and own in DEFAULTS else kind


def sampling_defaults(name: str, *, revision: str | None = None) -> dict[str, object]:
    """Defaults of the options of drawing: those of a base's family; of any other pipeline, of ``sd``."""
    kind = pipeline_class(name, revision=revision)
    return DEFAULTS[family_of(name, revision=revision)] if kind in FAMILIES else DEFAULTS["sd"]


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
) -> Base:
    """Loads a base, frozen: denoiser and text encoders in `dtype`, the autoencoder always in float32.

    Args:
        name: a diffusers folder, a hub name, a single `.safetensors` checkpoint or `embedded:NAME`.
        vae: another autoencoder in place of the base's own: folder, hub name or `.safetensors` file.
        prediction_type: epsilon, v_prediction or sample, where the base's scheduler says it wrongly.
        safety_checker: keep the one of a Stable Diffusion pipeline.
    Raises: OSError or ValueError that says what was expected at `name`.
    """
    kind, family = _kind_of(name, revision), family_of(name, revision=revision)
    changes = {"vae": vae, "prediction_type": prediction_type, "safety_checker": safety_checker}
    pipe = open_pipeline(name, dtype=dtype, revision=revision, variant=variant, **changes)
    pipe.to(device)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    missing = [
        part for part, value in pipe.components.items() if value is None and part not in OPTIONAL_PARTS
    ]
    if missing:
        raise ValueError(f"{name} has no {', '.join(missing)}; give the folder of a whole pipeline")
    return BASES[kind](pipe, name, family)


def _kind_of(name: str, revision: str | None) -> str:
    kind = pipeline_class(name, revision=revision)
    if kind not in FAMILIES:
        raise ValueError(f"{name!r} is a {kind}; the known kinds are {', '.join(FAMILIES)}")
    return FAMILIES[kind]
