"""Whole checkpoints in one .safetensors file, in the layout of the original Stable Diffusion code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_PICKLED = (".ckpt", ".pt", ".pth", ".bin")
_UNET = "model.diffusion_model.input_blocks.0.0.weight"
_ENCODERS = {  # a key that only files with these text encoders have -> the pipeline of the file
    "conditioner.embedders.1.model.ln_final.weight": "StableDiffusionXLPipeline",
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": "StableDiffusionPipeline",
    "cond_stage_model.model.ln_final.weight": "StableDiffusionPipeline",
}


def is_single_file(place: str) -> bool:
    """Whether a name is that of one file. Raises: ValueError for a pickled one, which could run any code."""
    if place.endswith(_PICKLED):
        raise ValueError(
            f"{place} is a pickled checkpoint, which can run any code when it is opened; "
            "convert it to .safetensors"
        )
    return place.endswith(".safetensors")


def pipeline_of_file(path: str) -> str:
    """The pipeline class of a checkpoint, by its keys.

    Raises: FileNotFoundError; ValueError for a file that is damaged or holds no whole pipeline we know.
    """
    shape, keys = _header(path)
    for key, name in _ENCODERS.items():
        if key in keys and shape:
            if shape[1] != 4:
                raise ValueError(
                    f"{path}: its UNet takes {shape[1]} channels, as inpainting and editing models do; "
                    "the known kinds take 4"
                )
            return name
    what = "a UNet without text encoders in a known layout" if shape else "no UNet in the original layout"
    known = ", ".join(sorted(set(_ENCODERS.values())))
    raise ValueError(f"{path} holds {what}; known are whole checkpoints of {known}")


def open_single_file(path: str) -> DiffusionPipeline:
    """The pipeline of a checkpoint, in float32. Configurations and tokenizers come from a folder of the same
    name beside the file, else from the hub's folder of that kind.

    Raises: OSError when they are nowhere to be had, ValueError when they do not fit the file.
    """
    import diffusers  # takes seconds: names are asked for before anything is loaded
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    kind = getattr(diffusers, pipeline_of_file(path))
    beside = Path(path).with_suffix("")
    config = {"config": str(beside), "local_files_only": True} if beside.is_dir() else {}
    optional = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    if kind.__name__ == "StableDiffusionPipeline":
        optional["requires_safety_checker"] = False
    try:
        pipe = kind.from_single_file(path, torch_dtype=torch.float32, **config, **optional)
    except SingleFileComponentError as error:
        raise ValueError(f"{path} is not a whole checkpoint: {_first_line(error)}") from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = _first_line(error)
        if config:
            raise ValueError(f"{path} does not fit the configurations at {beside}: {reason}") from error
        raise OSError(
            f"{path}: a single file has no configuration or tokenizer; without a network, put the pipeline's "
            f"folder without weights (model_index.json, every config.json, tokenizers) at {beside} ({reason})"
        ) from error
    _apply_marks(pipe, _header(path)[1])
    return pipe


def _apply_marks(pipe: DiffusionPipeline, keys: frozenset[str]) -> None:
    """Two empty tensors by which SDXL checkpoints say how they were trained: ``v_pred`` and ``ztsnr``."""
    marks: dict[str, object] = {}
    if "v_pred" in keys:
        marks["prediction_type"] = "v_prediction"
    if "ztsnr" in keys:
        marks |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if marks:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **marks)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _header(path: str) -> tuple[list[int] | None, frozenset[str]]:
    """The shape of the UNet's first convolution and every key."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            keys = frozenset(file.keys())
            return (file.get_slice(_UNET).get_shape() if _UNET in keys else None), keys
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch it again") from None
