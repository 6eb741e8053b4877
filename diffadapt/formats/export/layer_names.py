"""Names of layers in kohya's files, and which of them each program finds in its own copy of the model."""

from __future__ import annotations

import re

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.architectures import Architecture, architecture_of
from diffadapt.adapters.attach import pipeline_of
from diffadapt.common.pipeline_components import DENOISERS, is_text_encoder
from diffadapt.formats.export.exported_layer import ExportedLayer

# Layers of UNet2DConditionModel that have a counterpart in the UNet of the first Stable Diffusion's code:
# ComfyUI 0.3.77, comfy/utils.py: unet_to_diffusers and its maps UNET_MAP_*.
_BLOCK = r"(?:(?:down|up)_blocks\.\d+|mid_block)"
_UNET_LAYERS = re.compile(
    r"conv_in|conv_out|conv_norm_out|(?:time|add)_embedding\.linear_[12]"
    rf"|{_BLOCK}\.resnets\.\d+\.(?:norm1|norm2|conv1|conv2|time_emb_proj|conv_shortcut)"
    rf"|{_BLOCK}\.attentions\.\d+\.(?:norm|proj_in|proj_out)"
    rf"|{_BLOCK}\.attentions\.\d+\.transformer_blocks\.\d+\.(?:norm[123]|ff\.net\.0\.proj|ff\.net\.2"
    r"|attn[12]\.(?:to_q|to_k|to_v|to_out\.0))"
    r"|down_blocks\.\d+\.downsamplers\.0\.conv|up_blocks\.\d+\.upsamplers\.0\.conv"
)
_TEXT_PROJECTIONS = re.compile(
    r"text_model\.encoder\.layers\.\d+\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])"
)
_TEXT_LAYERS = re.compile(r"text_model\.encoder\.layers\.\d+\.[\w.]+")
_SGM_BLOCKS = ("input_blocks", "middle_block", "output_blocks")
# stable-diffusion-webui 1.10.1, networks.py: convert_diffusers_name_to_compvis has no rule for these
_UNKNOWN_TO_A1111 = re.compile(r"conv_norm_out|add_embedding\.\w+")


def base_architecture(adapter: Adapter) -> Architecture:
    """The architecture of the base; of a lone text encoder, that of its pipeline."""
    # the adapter's denoiser, else that of the pipeline of an adapted text encoder, else a bare model
    models = [adapter.roots.get(name) for name in DENOISERS]
    pipeline = pipeline_of(adapter)
    models += [getattr(pipeline, name, None) for name in DENOISERS]
    models.append(adapter.roots.get(""))
    denoisers = [model for model in models if model is not None]
    return architecture_of(denoisers[0] if denoisers else None)


def has_diffusers_names(base: Architecture) -> bool:
    """Whether files for ComfyUI name the layers of a base as diffusers does."""
    return base.published_names is not None and base.published_names.original_layer is not None


def kohya_name(component: str, path: str, base: Architecture) -> str:
    """`lora_unet_...`, `lora_te_...`; with several text encoders `lora_te1_...`, `lora_te2_...`.

    As in kohya's own files, layers of SDXL's UNet have the names of the original code, the others diffusers'.
    Layers of transformers and of their text encoders are `transformer.<path>`, `text_encoder.<path>`, so that
    ComfyUI and diffusers open the same file.

    Raises:
        ValueError: the model has no name there.
    """
    names = base.published_names
    is_denoiser = component in DENOISERS
    if names is None or not (is_denoiser or is_text_encoder(component)):
        model = component or "this model"
        raise ValueError(
            f"kohya's file format has no name for layers of {model}: it knows the UNet and the CLIP text "
            "encoders of Stable Diffusion 1, 2 and XL, and the transformers of SD3, FLUX, Z-Image, "
            "Qwen-Image, Krea 2, Chroma and PixArt-Sigma; use --to merged"
        )
    if has_diffusers_names(base):
        return f"{component}.{clip_path(component, path)}"
    if is_denoiser:
        original_path = None if names.original_path is None else names.original_path(path)
        return "lora_unet_" + (original_path or path).replace(".", "_")
    # text_encoder, text_encoder_2, ... -> te, te2, ...; te1 where the pipeline has two
    number = component.removeprefix("text_encoder").removeprefix("_")
    if not number and names.numbers_first_encoder:
        number = "1"
    return f"lora_te{number}_" + clip_path(component, path).replace(".", "_")


def clip_path(component: str, path: str) -> str:
    """The path in a CLIP text encoder with the level that transformers 5 no longer has, as files name it."""
    if is_text_encoder(component) and not path.startswith(("text_model.", "text_projection")):
        return f"text_model.{path}"
    return path


def found_by_comfyui(layer: ExportedLayer) -> bool:
    """Whether ComfyUI's tables (comfy/lora.py, 0.3.77) list the layer."""
    layers = _TEXT_PROJECTIONS if is_text_encoder(layer.component) else _UNET_LAYERS
    return layers.fullmatch(clip_path(layer.component, layer.path)) is not None


def found_by_sd_scripts(layer: ExportedLayer, base: Architecture) -> bool:
    """Whether kohya's sd-scripts (48d368f) make a LoRA of the layer: in SDXL inside the blocks alone."""
    original_path = base.published_names and base.published_names.original_path
    if is_text_encoder(layer.component) or original_path is None:
        return True
    name = original_path(layer.path) or ""
    return name.partition(".")[0] in _SGM_BLOCKS and name != "input_blocks.0.0"


def found_by_a1111(layer: ExportedLayer, base: Architecture) -> bool:
    """Whether stable-diffusion-webui 1.10.1 finds the layer under the name it has in the file."""
    path = clip_path(layer.component, layer.path)
    if is_text_encoder(layer.component):
        text_layers = _TEXT_LAYERS if layer.component == "text_encoder" else _TEXT_PROJECTIONS
        return text_layers.fullmatch(path) is not None
    original_path = base.published_names and base.published_names.original_path
    if original_path is not None:
        return original_path(path) is not None  # it has the file's own names
    return _UNET_LAYERS.fullmatch(path) is not None and _UNKNOWN_TO_A1111.fullmatch(path) is None
