"""The published bases with a diffusion transformer as shapes: their configurations, on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn


@dataclass(frozen=True)
class PublishedBase:
    """A base by its name, and the pipeline with its components.

    Attributes:
        name: as users know it.
        pipeline: class in diffusers.
        components: component -> what makes it; tokenizers are left out.
    """

    name: str
    pipeline: str
    components: dict[str, Callable[[], nn.Module]]

    def make(self) -> DiffusionPipeline:
        """The pipeline with weights in bfloat16 and the autoencoder in float32, all without values."""
        pipeline_class = getattr(diffusers, self.pipeline)
        components: dict[str, object] = {}
        with torch.device("meta"):
            for name, make in self.components.items():
                component = make().requires_grad_(False).eval()
                components[name] = component if name == "vae" else component.to(torch.bfloat16)
        for name in pipeline_class._get_signature_keys(pipeline_class)[0]:
            components.setdefault(name, None)
        components["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
        return pipeline_class(**components)


def t5_xxl() -> nn.Module:
    config = transformers.T5Config(
        d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config)


def clip_l() -> nn.Module:
    config = transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    return transformers.CLIPTextModelWithProjection(config)


def clip_g() -> nn.Module:
    config = transformers.CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
    )
    return transformers.CLIPTextModelWithProjection(config)


def qwen3_4b() -> nn.Module:
    return transformers.Qwen3Model(
        transformers.Qwen3Config(
            hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_key_value_heads=8
        )
    )


def qwen3_8b() -> nn.Module:
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_key_value_heads=8
        )
    )


def qwen25_vl_7b() -> nn.Module:
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision | {"out_hidden_size": 3584})
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl_4b() -> nn.Module:
    text = {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560}
    return transformers.Qwen3VLModel(transformers.Qwen3VLConfig(text_config=text, vision_config=vision))


def autoencoder(latent_channels: int = 16) -> nn.Module:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=latent_channels,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def sd35_medium() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
        qk_norm="rms_norm",
        dual_attention_layers=tuple(range(13)),
    )


def sd35_large() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        num_layers=38,
        attention_head_dim=64,
        num_attention_heads=38,
        joint_attention_dim=4096,
        caption_projection_dim=2432,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    )


def flux1_dev() -> nn.Module:
    return diffusers.FluxTransformer2DModel(guidance_embeds=True)


def klein_4b() -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        num_layers=5,
        num_single_layers=20,
        num_attention_heads=24,
        joint_attention_dim=7680,
        guidance_embeds=False,
    )


def klein_9b() -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        num_layers=8,
        num_single_layers=24,
        num_attention_heads=32,
        joint_attention_dim=12288,
        guidance_embeds=False,
    )


def flux2_dev() -> nn.Module:
    return diffusers.Flux2Transformer2DModel(guidance_embeds=True)


def mistral_small_3() -> nn.Module:
    text = {
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
        "tie_word_embeddings": False,
    }
    vision = {"model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096}
    vision |= {"num_hidden_layers": 24, "num_attention_heads": 16, "head_dim": 64, "patch_size": 14}
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return transformers.Mistral3ForConditionalGeneration(config)


def pixart_sigma() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        sample_size=128,
        num_layers=28,
        attention_head_dim=72,
        num_attention_heads=16,
        caption_channels=4096,
        cross_attention_dim=1152,
        in_channels=4,
        out_channels=8,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )


SD3_TEXT = {"text_encoder": clip_l, "text_encoder_2": clip_g, "text_encoder_3": t5_xxl}
BASES = (
    PublishedBase(
        "PixArt-Sigma",
        "PixArtSigmaPipeline",
        {"transformer": pixart_sigma, "text_encoder": t5_xxl, "vae": lambda: autoencoder(4)},
    ),
    PublishedBase(
        "SD 3.5 medium",
        "StableDiffusion3Pipeline",
        {"transformer": sd35_medium, "vae": autoencoder, **SD3_TEXT},
    ),
    PublishedBase(
        "FLUX.2 klein 4B",
        "Flux2KleinPipeline",
        {"transformer": klein_4b, "text_encoder": qwen3_4b, "vae": lambda: diffusers.AutoencoderKLFlux2()},
    ),
    PublishedBase(
        "Z-Image",
        "ZImagePipeline",
        {
            "transformer": lambda: diffusers.ZImageTransformer2DModel(),
            "text_encoder": qwen3_4b,
            "vae": autoencoder,
        },
    ),
    PublishedBase(
        "SD 3.5 large",
        "StableDiffusion3Pipeline",
        {"transformer": sd35_large, "vae": autoencoder, **SD3_TEXT},
    ),
    PublishedBase(
        "Chroma",
        "ChromaPipeline",
        {
            "transformer": lambda: diffusers.ChromaTransformer2DModel(),
            "text_encoder": t5_xxl,
            "vae": autoencoder,
        },
    ),
    PublishedBase(
        "FLUX.2 klein 9B",
        "Flux2KleinPipeline",
        {"transformer": klein_9b, "text_encoder": qwen3_8b, "vae": lambda: diffusers.AutoencoderKLFlux2()},
    ),
    PublishedBase(
        "FLUX.1",
        "FluxPipeline",
        {"transformer": flux1_dev, "text_encoder": clip_l, "text_encoder_2": t5_xxl, "vae": autoencoder},
    ),
    PublishedBase(
        "Krea 2",
        "Krea2Pipeline",
        {
            "transformer": lambda: diffusers.Krea2Transformer2DModel(),
            "text_encoder": qwen3_vl_4b,
            "vae": lambda: diffusers.AutoencoderKLQwenImage(),
        },
    ),
    PublishedBase(
        "Qwen-Image",
        "QwenImagePipeline",
        {
            "transformer": lambda: diffusers.QwenImageTransformer2DModel(),
            "text_encoder": qwen25_vl_7b,
            "vae": lambda: diffusers.AutoencoderKLQwenImage(),
        },
    ),
    PublishedBase(
        "FLUX.2 dev",
        "Flux2Pipeline",
        {
            "transformer": flux2_dev,
            "text_encoder": mistral_small_3,
            "vae": lambda: diffusers.AutoencoderKLFlux2(),
        },
    ),
)
