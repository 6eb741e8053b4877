"""The embedded base put together: its denoiser, its sampler, and the pipeline of all components."""

from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from progress import replace_folder
from torchvision.transforms.functional import to_tensor
from torchvision.utils import save_image
from transformers import CLIPTextModel, CLIPTokenizer

SAMPLE_PROMPTS = [
    "a pizza emoji",
    "a cat face emoji",
    "a red apple emoji",
    "a ghost emoji",
    "a blue heart emoji",
    "a rocket emoji",
    "a grinning emoji",
    "a dog emoji",
    "a tulip emoji",
    "a house emoji",
    "a soccer emoji",
    "a skull emoji",
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


def build_sampler() -> DDIMScheduler:
    """The sampler of the pipeline, whose noise schedule is that of training."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",  # ends in pure noise, Nichol and Dhariwal 2021
        prediction_type="v_prediction",
        timestep_spacing="trailing",  # starts at pure noise however few the steps
        clip_sample=False,
        steps_offset=1,
    )


def write_pipeline(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    vae: AutoencoderTiny,
    tokenizer: CLIPTokenizer,
    build: Path,
    step: int,
) -> None:
    """Saves the pipeline in float32, and an image sheet of what it generates."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_sampler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    replace_folder(build / "pipeline", pipe.save_pretrained)
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(SAMPLE_PROMPTS))]
    images = pipe(SAMPLE_PROMPTS, generator=seeds, num_inference_steps=20, guidance_scale=4.0).images
    sheet = torch.stack([to_tensor(image) for image in images])
    save_image(sheet, build / f"samples-{step:05d}.png", nrow=8)
