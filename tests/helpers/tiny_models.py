"""Tiny random pipelines to export adapters of, with a few layers of every kind chosen to adapt."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from helpers.method_cases import train
from helpers.pipelines import clip_tokenizer, tiny_sd_pipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import diffadapt as da

# Linear with and without a bias, convolutions of 3 x 3, 1 x 1 and stride 2, before, in and after the blocks.
LAYERS = (
    "conv_in+conv_out+time_embedding.linear_1+mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    "+mid_block.attentions.0.transformer_blocks.0.attn2.to_k+mid_block.attentions.0.proj_in"
    "+mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    "+mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj+down_blocks.0.downsamplers.0.conv"
    "+up_blocks.0.upsamplers.0.conv+mid_block.resnets.0.conv1+mid_block.resnets.0.time_emb_proj"
    "+up_blocks.1.resnets.0.conv_shortcut"
)
TEXT_LAYERS = "encoder.layers.0.self_attn.q_proj+encoder.layers.1.mlp.fc1"
SIZE = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}


def sd_folder(folder: Path) -> Path:
    return tiny_sd_pipeline(folder / "sd", prediction_type="v_prediction")


def sdxl_folder(folder: Path) -> Path:
    """A StableDiffusionXLPipeline with two text encoders, 24 tokens and latents of 8 x 8."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = clip_tokenizer(folder / "words")
        pipe = StableDiffusionXLPipeline(
            vae=AutoencoderTiny(
                encoder_block_out_channels=(16, 16),
                decoder_block_out_channels=(16, 16),
                num_encoder_blocks=(1, 1),
                num_decoder_blocks=(1, 1),
                latent_channels=4,
            ),
            text_encoder=CLIPTextModel(_text_config(len(tokenizer))),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(len(tokenizer))),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=_sdxl_unet(),
            scheduler=DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
        )
    pipe.save_pretrained(folder / "sdxl")
    return folder / "sdxl"


def _text_config(words: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=words,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=24,
        projection_dim=16,
        eos_token_id=words - 1,
        bos_token_id=words - 2,
        pad_token_id=words - 1,
    )


def _sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        cross_attention_dim=32,
        norm_num_groups=8,
    )


def open_pipeline(folder: Path, dtype: torch.dtype = torch.float32):
    kind = StableDiffusionXLPipeline if folder.name == "sdxl" else StableDiffusionPipeline
    pipe = kind.from_pretrained(folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def trained(
    pipe, method: str, *, layers: str | None = None, text: str | None = TEXT_LAYERS, size: float = 0.05
):
    """An adapter whose values are far enough from the start to be seen in the pictures."""
    biased = f"{LAYERS}+!to_q+!to_k" if "bitfit" in method else LAYERS
    adapter = da.attach(pipe, da.make_method(method), layers or biased, text_encoder_targets=text)
    train(adapter, size)
    return adapter


@torch.no_grad()
def latents(pipe, **size) -> Tensor:
    """What the pipeline draws for one prompt and seed, before decoding."""
    return pipe("a red fox", generator=torch.Generator().manual_seed(1), **SIZE | size).images
