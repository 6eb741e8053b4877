"""Tiny random pipelines of the transformer families, made offline: all parts that the published ones have."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from helpers.pipelines import clip_tokenizer
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

SIDE = 64  # pixels: latents of 8 x 8, 16 image tokens in most families
CLIP_WIDTH = 16
T5_WIDTH = 32
QWEN_WIDTH = 16

# As Qwen3's own template for messages of text alone, with the empty thought that stands for "do not think".
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# As that of Mistral Small for one system and one user message, each a list of one text.
_MISTRAL_TEMPLATE = (
    "<s>{% for message in messages %}{% set text = message['content'][0]['text'] %}"
    "{% if message['role'] == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ text }}[/INST]{% endif %}{% endfor %}"
)


def tiny_pipeline(family: str) -> DiffusionPipeline:
    """A random pipeline of a family, the same bits every time; its tests are skipped without the class.

    Args:
        family: One of `FAMILIES`.
    """
    class_name, make = _FAMILIES[family]
    if not hasattr(diffusers, class_name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {class_name}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = make()
        _randomise_constants(pipe.transformer)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The saved folder of `tiny_pipeline(family)`, written once in a session; read it, do not write to it."""
    folder = tmp_path_factory.getbasetemp() / "families" / family
    if not folder.exists():
        tiny_pipeline(family).save_pretrained(folder)
    return folder


def _randomise_constants(model: nn.Module) -> None:
    """Gives noise to what starts constant or as undefined memory (norms, tokens), so that tests see it."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("pad_token"):  # torch.empty in ZImageTransformer2DModel
                parameter.normal_()
            elif parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
                parameter += 0.1 * torch.randn_like(parameter)


def _sd3(**transformer: object) -> DiffusionPipeline:
    without_t5 = transformer.pop("without_t5", False)
    tokenizer = _clip_tokenizer()
    t5_tokenizer = None if without_t5 else _t5_tokenizer(256)
    settings = {
        "sample_size": SIDE // 8,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": T5_WIDTH,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 2 * CLIP_WIDTH,
        "pos_embed_max_size": 16,
    }
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(**settings | transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_kl_autoencoder(),
        text_encoder=_clip(tokenizer, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        text_encoder_2=_clip(tokenizer, CLIPTextModelWithProjection),
        tokenizer_2=tokenizer,
        text_encoder_3=None if without_t5 else _t5(t5_tokenizer),
        tokenizer_3=t5_tokenizer,
    )


def _sd35_medium() -> DiffusionPipeline:
    """A second attention over the image alone in the first block, and normalised queries and keys."""
    return _sd3(qk_norm="rms_norm", dual_attention_layers=(0,))


def _sd3_without_t5() -> DiffusionPipeline:
    return _sd3(without_t5=True)


def _flux(guidance_embeds: bool = True) -> DiffusionPipeline:
    tokenizer = _clip_tokenizer()
    t5_tokenizer = _t5_tokenizer(512)
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=CLIP_WIDTH,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(2, 2, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance_embeds),
        vae=_kl_autoencoder(),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_t5(t5_tokenizer),
        tokenizer_2=t5_tokenizer,
    )


def _flux_schnell() -> DiffusionPipeline:
    return _flux(guidance_embeds=False)


def _flux2_transformer(layer_count: int, *, guidance_embeds: bool) -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=layer_count * QWEN_WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
    )


def _flux2_klein() -> DiffusionPipeline:
    tokenizer = _qwen_tokenizer(512)
    layers_read = (9, 18, 27)  # of 36; the hidden states of these layers side by side are the text
    return diffusers.Flux2KleinPipeline(
        transformer=_flux2_transformer(len(layers_read), guidance_embeds=False),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=_flux2_autoencoder(),
        text_encoder=Qwen3ForCausalLM(_qwen3_config(tokenizer, layers=31)),
        tokenizer=tokenizer,
    )


def _flux2_dev() -> DiffusionPipeline:
    processor = _mistral_processor()
    layers_read = (10, 20, 30)  # of 40
    return diffusers.Flux2Pipeline(
        transformer=_flux2_transformer(len(layers_read), guidance_embeds=True),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=_flux2_autoencoder(),
        text_encoder=Mistral3ForConditionalGeneration(_mistral3_config(processor.tokenizer, layers=31)),
        tokenizer=processor,
    )


def _qwen_image() -> DiffusionPipeline:
    tokenizer = _qwen_tokenizer(1024)
    return diffusers.QwenImagePipeline(
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=QWEN_WIDTH,
            axes_dims_rope=(4, 2, 2),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9
        ),
        vae=_qwen_autoencoder(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(_qwen25_vl_config(tokenizer)),
        tokenizer=tokenizer,
    )


def _z_image() -> DiffusionPipeline:
    tokenizer = _qwen_tokenizer(512)
    return diffusers.ZImagePipeline(
        transformer=diffusers.ZImageTransformer2DModel(
            dim=16,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=QWEN_WIDTH,
            axes_dims=[4, 2, 2],
            axes_lens=[1024, 64, 64],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=_kl_autoencoder(),
        text_encoder=Qwen3Model(_qwen3_config(tokenizer, layers=2)),
        tokenizer=tokenizer,
    )


def _krea2() -> DiffusionPipeline:
    tokenizer = _qwen_tokenizer(1024)
    layers_read = (1, 2)
    return diffusers.Krea2Pipeline(
        transformer=diffusers.Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            timestep_embed_dim=16,
            text_hidden_dim=QWEN_WIDTH,
            num_text_layers=len(layers_read),
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=32,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 2, 2),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        vae=_qwen_autoencoder(),
        text_encoder=Qwen3VLModel(_qwen3_vl_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_select_layers=layers_read,
    )


def _chroma() -> DiffusionPipeline:
    tokenizer = _t5_tokenizer(512)
    return diffusers.ChromaPipeline(
        transformer=diffusers.ChromaTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            axes_dims_rope=(2, 2, 4),
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=_kl_autoencoder(),
        text_encoder=_t5(tokenizer),
        tokenizer=tokenizer,
    )


def _pixart_sigma() -> DiffusionPipeline:
    tokenizer = _t5_tokenizer(300)
    return diffusers.PixArtSigmaPipeline(
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=SIDE // 8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=T5_WIDTH,
            cross_attention_dim=16,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        vae=_kl_autoencoder(latent_channels=4, shift_factor=None, scaling_factor=0.13025, quant_conv=True),
        text_encoder=_t5(tokenizer),
        tokenizer=tokenizer,
    )


# family -> its pipeline's class and how a tiny one is made
_FAMILIES: dict[str, tuple[str, Callable[[], DiffusionPipeline]]] = {
    "sd3": ("StableDiffusion3Pipeline", _sd3),
    "sd35_medium": ("StableDiffusion3Pipeline", _sd35_medium),
    "sd3_without_t5": ("StableDiffusion3Pipeline", _sd3_without_t5),
    "flux": ("FluxPipeline", _flux),
    "flux_schnell": ("FluxPipeline", _flux_schnell),
    "flux2_klein": ("Flux2KleinPipeline", _flux2_klein),
    "flux2_dev": ("Flux2Pipeline", _flux2_dev),
    "qwen_image": ("QwenImagePipeline", _qwen_image),
    "z_image": ("ZImagePipeline", _z_image),
    "krea2": ("Krea2Pipeline", _krea2),
    "chroma": ("ChromaPipeline", _chroma),
    "pixart_sigma": ("PixArtSigmaPipeline", _pixart_sigma),
}
FAMILIES = tuple(_FAMILIES)


def _clip_tokenizer() -> CLIPTokenizer:
    """The letter tokenizer with the length of the published ones, which pipelines rely on."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = clip_tokenizer(Path(folder))
    tokenizer.model_max_length = 77
    return tokenizer


def _t5_tokenizer(length: int) -> T5Tokenizer:
    """A T5 tokenizer that spells every word letter by letter."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    for letter in "abcdefghijklmnopqrstuvwxyz0123456789.,!?:'-":
        pieces.append((letter, -3.0))
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def _qwen_tokenizer(length: int) -> Qwen2Tokenizer:
    """A Qwen tokenizer with a chat template that spells every word byte by byte."""
    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pieces = [*special_tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        model_max_length=length,
        additional_special_tokens=special_tokens[1:],
    )
    tokenizer.add_tokens(["assistant"])  # one token, or Krea 2's fixed suffix would be longer than 5
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _mistral_processor() -> PixtralProcessor:
    """A processor of texts and images; its tokenizer spells every word byte by byte."""
    image_tokens = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    special_tokens = ["<pad>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    special_tokens += image_tokens
    pieces = [*special_tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[],
        model_max_length=1024,
        unk_token=None,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=special_tokens[3:],
    )
    return PixtralProcessor(
        image_processor=PixtralImageProcessor(),
        tokenizer=tokenizer,
        patch_size=16,
        spatial_merge_size=1,
        chat_template=_MISTRAL_TEMPLATE,
    )


def _clip(tokenizer: CLIPTokenizer, kind: type = CLIPTextModel) -> nn.Module:
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=CLIP_WIDTH,
            intermediate_size=2 * CLIP_WIDTH,
            projection_dim=CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=T5_WIDTH,
            d_kv=8,
            d_ff=2 * T5_WIDTH,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
        )
    )


def _mistral3_config(tokenizer: Qwen2Tokenizer, *, layers: int) -> Mistral3Config:
    return Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": len(tokenizer),
            "hidden_size": QWEN_WIDTH,
            "intermediate_size": QWEN_WIDTH,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 1024,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
            "head_dim": 8,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )


def _qwen3_config(tokenizer: Qwen2Tokenizer, *, layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=QWEN_WIDTH,
        intermediate_size=QWEN_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
    )


def _qwen25_vl_config(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": QWEN_WIDTH,
            "intermediate_size": QWEN_WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
            "rope_theta": 1e6,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": QWEN_WIDTH,
        },
        vision_start_token_id=1,
        vision_end_token_id=1,
        vision_token_id=1,
    )


def _qwen3_vl_config(tokenizer: Qwen2Tokenizer) -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": QWEN_WIDTH,
            "intermediate_size": QWEN_WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "rope_parameters": {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 5e6},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": QWEN_WIDTH,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        vision_start_token_id=1,
        vision_end_token_id=1,
    )


def _kl_autoencoder(
    *,
    latent_channels: int = 16,
    shift_factor: float | None = 0.1,
    scaling_factor: float = 0.36,
    quant_conv: bool = False,
) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=SIDE,
        shift_factor=shift_factor,
        scaling_factor=scaling_factor,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
    )


def _flux2_autoencoder() -> nn.Module:
    """Its statistics are random, as a trained one's: the pipeline normalises latents with them."""
    autoencoder = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
    )
    autoencoder.bn.running_mean.normal_(std=0.1)
    autoencoder.bn.running_var.uniform_(0.5, 1.5)
    return autoencoder


def _qwen_autoencoder() -> nn.Module:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=(0.1, 0.2, -0.1, 0.0),
        latents_std=(1.5, 2.0, 1.0, 0.5),
    )


def denoiser_arguments(family: str, pipe: DiffusionPipeline) -> tuple[tuple, dict]:
    """What the stock pipeline passes to its denoiser in the first step for one image without guidance."""
    arguments = {
        "qwen_image": {"true_cfg_scale": 1.0},
        "krea2": {"guidance_scale": 0.0},
        "z_image": {"guidance_scale": 0.0},
        "pixart_sigma": {"guidance_scale": 1.0, "use_resolution_binning": False},
    }
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    pipe(
        prompt="a sks dog",
        height=SIDE,
        width=SIDE,
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **arguments.get(family, {"guidance_scale": 1.0}),
    )
    hook.remove()
    return calls[0]


def denoiser_output(pipe: DiffusionPipeline, call: tuple[tuple, dict]) -> torch.Tensor:
    """The denoiser's output for the arguments of `denoiser_arguments`, with gradients."""
    args, kwargs = call
    output = pipe.transformer(*args, **kwargs)[0]
    return torch.stack(output) if isinstance(output, list) else output  # a list in Z-Image
