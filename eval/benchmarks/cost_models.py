"""The denoisers whose costs are measured, built from their configurations, and their inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import diffadapt as da

SD15 = {  # 859.5 million parameters
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL = {  # 2567 million parameters
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
EMBEDDED = {  # as the embedded base, for installations without it
    "sample_size": 8,
    "in_channels": 16,
    "out_channels": 16,
    "block_out_channels": (96, 192),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 128,
    "attention_head_dim": 4,
}
TINY = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
SIZES = {"sd15": 32, "sdxl": 128, "embedded": 8, "tiny": 8}  # default height and width of the latents


def build(
    name: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> UNet2DConditionModel:
    """A frozen denoiser.

    Args:
        name: `sd15`, `sdxl` and `tiny` (random weights), or `embedded` (its trained weights).
        dtype: of the weights.
        device: of the weights.
    """
    torch.manual_seed(0)
    configs = {"sd15": SD15, "sdxl": SDXL, "tiny": TINY}
    if name in configs:
        with torch.device(device):
            model = UNet2DConditionModel(**configs[name])
    else:
        model = _embedded()
    return model.to(device, dtype).train().requires_grad_(False)


def unfilled_sdxl() -> UNet2DConditionModel:
    """SDXL's denoiser with uninitialised weights, for measurements that do not compute."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**SDXL)
    return model.to_empty(device="cpu")


@dataclass(frozen=True)
class Inputs:
    """Fixed inputs of a denoiser.

    Latents and text states require gradients, so that every model runs its whole backward.

    Attributes:
        latents: (B, C, H, W).
        timesteps: (B,).
        text: states of the text encoder (B, 77, width).
        added: SDXL's pooled text (B, 1280) and sizes (B, 6); None for other models.
    """

    latents: Tensor
    timesteps: Tensor
    text: Tensor
    added: dict[str, Tensor] | None = None

    def loss(self, model: nn.Module) -> Tensor:
        """The mean square of the model's prediction."""
        (prediction,) = model(
            self.latents, self.timesteps, self.text, added_cond_kwargs=self.added, return_dict=False
        )
        return prediction.float().square().mean()


def inputs(model: UNet2DConditionModel, name: str, batch: int, size: int | None = None) -> Inputs:
    """Random inputs on the model's device.

    Args:
        model: the denoiser.
        name: its name.
        batch: images.
        size: height and width of the latents; None: the one of SIZES.
    """
    generator = torch.Generator().manual_seed(1)
    config = model.config
    size = size or SIZES[name]
    device = model.device
    latents = torch.randn(batch, config.in_channels, size, size, generator=generator)
    text = torch.randn(batch, 77, config.cross_attention_dim, generator=generator)
    latents = latents.to(device, model.dtype).requires_grad_()
    text = text.to(device, model.dtype).requires_grad_()
    added = None
    if config.addition_embed_type == "text_time":
        pooled = torch.randn(batch, 1280, generator=generator).to(device, model.dtype)
        added = {"text_embeds": pooled, "time_ids": torch.full((batch, 6), 1024.0, device=device)}
    timesteps = torch.full((batch,), 500, device=device)
    return Inputs(latents, timesteps, text, added)


def _embedded() -> UNet2DConditionModel:
    """The embedded base's denoiser; a random one of the same shape where it is not installed."""
    try:
        folder = da.embedded("emoji") / "unet"
    except ValueError:
        folder = None
    if folder is None or not folder.is_dir():
        return UNet2DConditionModel(**EMBEDDED)
    return UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32)
