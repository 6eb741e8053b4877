"""Pipelines of real size with random weights, as folders that the training scripts can open."""

from __future__ import annotations

from pathlib import Path

import torch
from cost_models import SD15, SDXL
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import diffadapt as da

VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def real_base(name: str, dtype: torch.dtype, folder: Path) -> Path:
    """The folder of a pipeline, which is created on the first call.

    Args:
        name: `sd15` or `sdxl`.
        dtype: of the weights.
        folder: that contains the pipelines' folders.
    """
    base_folder = folder / f"{name}-{str(dtype).removeprefix('torch.')}"
    if not (base_folder / "model_index.json").is_file():
        build = {"sd15": _sd15, "sdxl": _sdxl}[name]
        build(dtype).save_pretrained(base_folder)
    return base_folder


def _sd15(dtype: torch.dtype) -> DiffusionPipeline:
    return StableDiffusionPipeline(
        vae=_random_model(AutoencoderKL, dtype, **VAE),
        text_encoder=_text_encoder(CLIPTextModel, dtype, CLIP_L),
        tokenizer=_tokenizer(),
        unet=_random_model(UNet2DConditionModel, dtype, **SD15),
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(dtype: torch.dtype) -> DiffusionPipeline:
    return StableDiffusionXLPipeline(
        vae=_random_model(AutoencoderKL, dtype, **VAE, scaling_factor=0.13025),
        text_encoder=_text_encoder(CLIPTextModel, dtype, CLIP_L),
        text_encoder_2=_text_encoder(CLIPTextModelWithProjection, dtype, {**CLIP_G, "projection_dim": 1280}),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=_random_model(UNet2DConditionModel, dtype, **SDXL),
        scheduler=EulerDiscreteScheduler(**SCHEDULE),
    )


def _tokenizer() -> CLIPTokenizer:
    """The embedded base's tokenizer: the vocabulary changes neither time nor memory."""
    tokenizer = CLIPTokenizer.from_pretrained(da.embedded("emoji") / "tokenizer")
    tokenizer.model_max_length = 77
    return tokenizer


def _text_encoder(model_class: type[nn.Module], dtype: torch.dtype, config: dict[str, int]) -> nn.Module:
    tokenizer = _tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    model = model_class(CLIPTextConfig(**config, **ids, vocab_size=49408))
    return _fill(model.to(dtype))


def _random_model(model_class: type[nn.Module], dtype: torch.dtype, **config: object) -> nn.Module:
    with torch.device("meta"):
        model = model_class(**config)
    return _fill(model.to(dtype).to_empty(device="cpu"))


def _fill(model: nn.Module) -> nn.Module:
    """Fills a model with small normal weights and norms of one, so that activations stay finite."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        with torch.no_grad():
            if value.dim() > 1:
                value.normal_(0, 0.02, generator=generator)
            else:
                value.fill_(0.0 if name.endswith("bias") else 1.0)
    return model.eval()
