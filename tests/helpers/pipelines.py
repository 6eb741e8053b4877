"""Tiny random Stable Diffusion and SDXL pipelines in the standard layout, for tests."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from diffadapt.training.options import TrainOptions

WIDTH = 32  # of the text states
POOLED = 24  # width of the second text encoder of an SDXL pipeline, and of its pooled text
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "euler": EulerDiscreteScheduler,
    "pndm": PNDMScheduler,
}


def tiny_sd_pipeline(
    folder: str | Path,
    *,
    vae: str = "tiny",
    prediction_type: str = "epsilon",
    scheduler: str = "ddim",
    seed: int = 0,
) -> Path:
    """Writes a random pipeline for 32-pixel pictures (latents 8 x 8 x 4) and returns its folder.

    Args:
        vae: "tiny" (AutoencoderTiny) or "kl" (AutoencoderKL).
        scheduler: "ddim", "ddpm" or "pndm".
    """
    folder = Path(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer(folder / "words")
        pipe = StableDiffusionPipeline(
            vae=tiny_vae() if vae == "tiny" else _kl_vae(),
            text_encoder=tiny_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=tiny_unet(),
            scheduler=_scheduler(scheduler, prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.save_pretrained(folder)
    return folder


def tiny_sdxl_pipeline(
    folder: str | Path,
    *,
    vae: str = "tiny",
    prediction_type: str = "epsilon",
    scheduler: str = "euler",
    force_zeros: bool = True,
    seed: int = 0,
) -> Path:
    """Writes a random StableDiffusionXLPipeline for 32-pixel pictures and returns its folder.

    Its text encoders differ in width, its tokenizers in how they pad.
    """
    folder = Path(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first, second = clip_tokenizer(folder / "words"), clip_tokenizer(folder / "words")
        second.pad_token = "!"
        pipe = StableDiffusionXLPipeline(
            vae=tiny_vae() if vae == "tiny" else _kl_vae(),
            text_encoder=tiny_text_encoder(first, layers=3),
            text_encoder_2=tiny_text_encoder(second, CLIPTextModelWithProjection, width=POOLED, layers=3),
            tokenizer=first,
            tokenizer_2=second,
            unet=tiny_sdxl_unet(),
            scheduler=_scheduler(scheduler, prediction_type),
            force_zeros_for_empty_prompt=force_zeros,
            add_watermarker=False,
        )
    pipe.save_pretrained(folder)
    return folder


def tiny_sdxl_unet() -> UNet2DConditionModel:
    """Three levels in SDXL's order, without attention on the first; 0.5 M parameters."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + POOLED,
        cross_attention_dim=WIDTH + POOLED,
        norm_num_groups=8,
    )


def tiny_unet() -> UNet2DConditionModel:
    """Two levels of 32 and 64 channels, cross attention on both; 0.9 M parameters."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer that spells every word letter by letter."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,!?:'-"]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(
        json.dumps({piece: index for index, piece in enumerate(pieces)}), encoding="utf-8"
    )
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=24)


def tiny_text_encoder(
    tokenizer: CLIPTokenizer, kind: type = CLIPTextModel, *, width: int = WIDTH, layers: int = 2
) -> CLIPTextModel | CLIPTextModelWithProjection:
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=24,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _kl_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )


def tiny_vae() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    )


def _scheduler(name: str, prediction_type: str) -> SchedulerMixin:
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    extra = {"pndm": {"skip_prk_steps": True}, "euler": {"timestep_spacing": "leading"}}
    settings |= extra.get(name, {"clip_sample": False})
    if name in ("ddim", "pndm"):
        settings["set_alpha_to_one"] = False
    return SCHEDULERS[name](**settings, steps_offset=1, prediction_type=prediction_type)


def tiny_clip(folder: str | Path) -> Path:
    """Writes a random CLIP model for 32-pixel pictures and returns its folder."""
    folder = Path(folder)
    tokenizer = clip_tokenizer(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {
            "hidden_size": WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        words = {"vocab_size": len(tokenizer), "max_position_embeddings": 24}
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        model = CLIPModel(
            CLIPConfig(
                text_config={**size, **words, **ends},
                vision_config={**size, "image_size": 32, "patch_size": 8},
                projection_dim=16,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size=32, crop_size=32).save_pretrained(folder)
    return folder


def write_pictures(folder: str | Path, count: int = 5, *, size: tuple[int, int] = (40, 40)) -> Path:
    """A folder of pictures: coloured discs on white, each different."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image = Image.new("RGB", size, "white")
        colour = (40 * index % 256, 250 - 35 * index % 256, 90 + 20 * index % 160)
        ImageDraw.Draw(image).ellipse((4 + index, 4, size[0] - 6, size[1] - 4 - index), fill=colour)
        image.save(folder / f"picture-{index}.png")
    return folder


def train_options(**given: object) -> TrainOptions:
    """Options of a small run in float32, complete."""
    small = {
        "adapter": "lora",
        "targets": "attention",
        "resolution": 32,
        "center_crop": True,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_train_steps": 6,
        "learning_rate": 1e-3,
        "lr_scheduler": "constant",
        "mixed_precision": "no",
    }
    return TrainOptions(**{**small, **given})
