"""The Stable Diffusion 1.x/2.x family: pixels to latents, words to states, the model's prediction.

Works for every pipeline stored in StableDiffusionPipeline's layout, with AutoencoderKL or AutoencoderTiny.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderTiny, DDPMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from diffadapt.models.names import check_base, is_embedded, resolve

# Values for options that were not given. What was tuned on the embedded base never reaches another base.
DEFAULTS = {
    "emoji": {
        "targets": "attention+conv",
        "train_batch_size": 8,
        "max_train_steps": 300,
        "lr_scheduler": "cosine",
        "mixed_precision": "bf16",
        "center_crop": True,
        "num_validation_images": 16,
        "num_inference_steps": 20,
        "guidance_scale": 4.0,
        "sample_batch_size": 20,
        "extractor": "embedded:clip",
    },
    "sd": {
        "targets": "attention",
        "train_batch_size": 4,
        "max_train_steps": 500,
        "lr_scheduler": "constant",
        "mixed_precision": "no",
        "center_crop": False,
        "num_validation_images": 4,
        "num_inference_steps": 25,
        "guidance_scale": 7.5,
        "sample_batch_size": 4,
        "extractor": None,
    },
}
# Ranks and learning rates that were tried on a base; other methods bring their own.
TUNED = {
    "emoji": {
        "lora": {"rank": 8, "learning_rate": 2e-3},
        "flora": {"rank": 14, "learning_rate": 2e-3},
    },
    "sd": {},
}


@dataclass
class StableDiffusion:
    """A loaded base: its pipeline, where it came from and which defaults fit it."""

    pipe: StableDiffusionPipeline
    source: str  # as named by the user: a folder, a hub name or embedded:NAME
    family: str  # key of DEFAULTS

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.unet

    @property
    def resolution(self) -> int:
        """The side of the pictures the base was made for, in pixels."""
        return self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor

    def training_schedule(self) -> DDPMScheduler:
        """The noise schedule the base was trained with, whatever sampler it is shipped with."""
        return DDPMScheduler.from_config(self.pipe.scheduler.config)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> what is cached: (B, 2C, h, w) mean and log-variance, or (B, C, h, w)."""
        vae = self.pipe.vae
        pixels = pixels.to(vae.device, vae.dtype)
        if isinstance(vae, AutoencoderTiny):
            return vae.encode(pixels).latents.float()
        return vae.encode(pixels).latent_dist.parameters.float()

    @property
    def is_stochastic(self) -> bool:
        """Whether encoding gives a distribution to sample from."""
        return not isinstance(self.pipe.vae, AutoencoderTiny)

    def draw_latents(self, encoded: Tensor, noise: Tensor | None) -> Tensor:
        """Latents at the denoiser's scale from `encode_pixels`; `noise` draws from the posterior."""
        scaling = self.pipe.vae.config.scaling_factor
        if noise is None:
            return encoded * scaling
        mean, log_variance = encoded.chunk(2, dim=1)
        spread = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))  # bounds of DiagonalGaussianDistribution
        return (mean + spread * noise) * scaling

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """(B, tokens, width) states of the text encoder."""
        encoder, tokenizer = self.pipe.text_encoder, self.pipe.tokenizer
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        mask = None
        if getattr(encoder.config, "use_attention_mask", False):
            mask = tokens.attention_mask.to(encoder.device)
        return encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0].float()

    def conditions(self, states: Tensor) -> dict[str, Tensor]:
        """What the denoiser is told besides the noisy latents and the timesteps."""
        return {"encoder_hidden_states": states}


def predict(denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    """The denoiser's output at its own precision."""
    dtype = denoiser.dtype
    told = {name: value.to(dtype) for name, value in conditions.items()}
    return denoiser(noisy.to(dtype), timesteps, return_dict=False, **told)[0]


def load(
    name: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    safety_checker: bool = False,
) -> StableDiffusion:
    """Loads a base; denoiser and text encoder in `dtype`, the autoencoder always in float32.

    Raises: FileNotFoundError or ValueError that says what was expected at `name`.
    """
    check_base(name)
    without = {} if safety_checker else {"safety_checker": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline.from_pretrained(
        resolve(name), dtype=torch.float32, revision=revision, variant=variant, **without
    )
    pipe.to(device)
    pipe.unet.to(dtype)
    pipe.text_encoder.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False).eval()
    return StableDiffusion(pipe, name, family_of(name))


def family_of(name: str) -> str:
    """The key of DEFAULTS for a base: what was tuned on the embedded base is for it alone."""
    return "emoji" if is_embedded(name) else "sd"
