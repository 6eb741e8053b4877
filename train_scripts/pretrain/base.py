"""The embedded base put together: the shape of its denoiser, its sampler, and the pipeline of all parts."""

from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from progress import replace_folder
from torchvision.transforms.functional import to_tensor
from torchvision.utils import save_image
from transformers import CLIPTextModel, CLIPTokenizer

SAMPLES = [
    *(f"a {name} emoji" for name in ("pizza", "cat face", "red apple", "ghost", "blue heart", "rocket")),
    *(f"a {name} emoji" for name in ("grinning", "dog", "tulip", "house", "soccer", "skull")),
    "a tiger face emoji in noto style",
    "a tiger face emoji in twemoji style",
    "a cat face emoji on a blue background",
    "a monkey face emoji and a banana emoji",
]


def build_unet() -> UNet2DConditionModel:
    """9.5 million parameters. `attention_head_dim` is the number of heads here."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(96, 192),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
    )


def sampler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",  # ends in pure noise, Nichol and Dhariwal 2021
        prediction_type="v_prediction",
        timestep_spacing="trailing",  # starts at pure noise however few the steps
        clip_sample=False,
        steps_offset=1,
    )


def write(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    vae: AutoencoderTiny,
    tokenizer: CLIPTokenizer,
    build: Path,
    step: int,
) -> None:
    """Save the pipeline in float32, and a picture of what it draws."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=sampler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    replace_folder(build / "pipeline", pipe.save_pretrained)
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(SAMPLES))]
    images = pipe(SAMPLES, generator=seeds, num_inference_steps=20, guidance_scale=4.0).images
    save_image(torch.stack([to_tensor(image) for image in images]), build / f"samples-{step:05d}.png", nrow=8)
