"""Whole checkpoints in one .safetensors file, in the layout of the original Stable Diffusion code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
# The UNet's first convolution: its shape says how many channels the UNet takes.
_UNET_KEY = "model.diffusion_model.input_blocks.0.0.weight"
_UNET_CHANNELS = 4  # that the denoiser takes, without a mask or an image to edit
_PIPELINES = {  # a key that only files with these text encoders have -> the pipeline of the file
    "conditioner.embedders.1.model.ln_final.weight": "StableDiffusionXLPipeline",
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": "StableDiffusionPipeline",
    "cond_stage_model.model.ln_final.weight": "StableDiffusionPipeline",
}


def is_single_file(path: str) -> bool:
    """Whether a name is that of one file. Raises: ValueError for a pickled one, which could run any code."""
    if path.endswith(_PICKLE_SUFFIXES):
        raise ValueError(
            f"{path} is a pickled checkpoint, which can run any code when it is opened; "
            "convert it to .safetensors"
        )
    return path.endswith(".safetensors")


def pipeline_of_file(path: str) -> str:
    """The pipeline class of a checkpoint, by its keys.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds no pipeline of a known kind.
    """
    unet_shape, keys = _read_header(path)
    supported = ", ".join(sorted(set(_PIPELINES.values())))
    if unet_shape is None:
        raise ValueError(
            f"{path} holds no UNet in the original layout; supported are whole checkpoints of {supported}"
        )
    pipelines = [pipeline for key, pipeline in _PIPELINES.items() if key in keys]
    if not pipelines:
        raise ValueError(
            f"{path} holds a UNet without text encoders in a known layout; supported are whole checkpoints "
            f"of {supported}"
        )
    channels = unet_shape[1]
    if channels != _UNET_CHANNELS:
        raise ValueError(
            f"{path}: its UNet takes {channels} channels, as inpainting and editing models do; the supported "
            f"kinds take {_UNET_CHANNELS}"
        )
    return pipelines[0]


def open_single_file(path: str) -> DiffusionPipeline:
    """The pipeline of a checkpoint, in float32.

    Configurations and tokenizers come from a folder of the same name beside the file, else from the hub's
    folder of that kind.

    Raises:
        OSError: the configurations are nowhere to be had.
        ValueError: they do not fit the file.
    """
    import diffusers  # takes seconds, and names are checked before anything is loaded
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    class_name = pipeline_of_file(path)
    pipeline_class = getattr(diffusers, class_name)
    options: dict[str, object] = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    if class_name == "StableDiffusionPipeline":
        options["requires_safety_checker"] = False
    config_folder = Path(path).with_suffix("")
    has_config = config_folder.is_dir()
    if has_config:
        options["config"] = str(config_folder)
        options["local_files_only"] = True
    try:
        pipe = pipeline_class.from_single_file(path, torch_dtype=torch.float32, **options)
    except SingleFileComponentError as error:
        raise ValueError(f"{path} is not a whole checkpoint: {_first_line(error)}") from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = _first_line(error)
        if has_config:
            raise ValueError(
                f"{path} does not fit the configurations at {config_folder}: {reason}"
            ) from error
        raise OSError(
            f"{path}: a single file has no configuration or tokenizer; without a network, put the pipeline's "
            "folder without weights (model_index.json, every config.json, tokenizers) at "
            f"{config_folder} ({reason})"
        ) from error
    _, keys = _read_header(path)
    _apply_schedule_marks(pipe, keys)
    return pipe


def _apply_schedule_marks(pipe: DiffusionPipeline, keys: frozenset[str]) -> None:
    """Sets the schedule by two empty tensors of SDXL checkpoints that say how they were trained.

    They are named `v_pred` and `ztsnr` (zero terminal signal-to-noise ratio).
    """
    settings: dict[str, object] = {}
    if "v_pred" in keys:
        settings["prediction_type"] = "v_prediction"
    if "ztsnr" in keys:
        settings["rescale_betas_zero_snr"] = True
        settings["timestep_spacing"] = "trailing"
    if settings:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **settings)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _read_header(path: str) -> tuple[list[int] | None, frozenset[str]]:
    """The shape of the UNet's first convolution, None where there is none, and every key."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            keys = frozenset(file.keys())
            unet_shape = file.get_slice(_UNET_KEY).get_shape() if _UNET_KEY in keys else None
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch it again") from None
    return unet_shape, keys
