"""ComfyUI ec93dca (2026) on diffusion transformers: comfy/lora.py and, of 09708ea, comfy/utils.py.

Its models hold several layers of diffusers in one weight. `load_lora` finds by diffusers' names the rows that
belong to a layer, and `calculate_weight` changes these rows in place, with the arithmetic of `comfyui`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from diffadapt.adapters.architectures import Architecture, OriginalLayer
from diffadapt.common.pipeline_components import is_text_encoder
from diffadapt.formats.emulators import Layer, Program, Result, comfyui

VERSION = "ec93dca"

# LoRAAdapter.load: ends that say the same
_LORA_ENDS = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_linear_layer.down.weight": "lora_down.weight",
    "lora_linear_layer.up.weight": "lora_up.weight",
}
# It passes over this key, which says to diffusers what `dora_scale` says to it.
_OF_DIFFUSERS = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
# model_lora_keys_clip: LORA_CLIP_MAP, in the encoders of a family that it calls by diffusers' names
_CLIP_LAYERS = re.compile(r"text_model\.encoder\.layers\.\d+\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])")
_CLIP_ENCODERS = {"sd3": ("text_encoder", "text_encoder_2"), "flux": ("text_encoder",)}
_FLUX2 = re.compile(r"\w+_modulation(?:_img|_txt)?\.linear|time_guidance_embed\..+")
# Layers that the ..._to_diffusers functions of a family leave out, though its model has them.
_UNMAPPED = {
    "flux2_klein": _FLUX2,
    "flux2_dev": _FLUX2,
    "chroma": re.compile(r"distilled_guidance_layer\..+"),
    "krea2": re.compile(r"text_fusion\.\w+_blocks\.(?:[2-9]|\d\d+)\..+"),  # two blocks of each kind
}


def comfyui_program(base: Architecture) -> Program:
    """ComfyUI with a model of an architecture."""
    return Program("ComfyUI", VERSION, partial(apply, base=base))


def place_of(name: str, base: Architecture) -> OriginalLayer | None:
    """model_lora_keys_unet and model_lora_keys_clip: where ComfyUI holds a layer; None where it finds none.

    Args:
        name: of the layer in the file: component and path in diffusers.
    """
    component, _, path = name.partition(".")
    if is_text_encoder(component):
        is_known = component in _CLIP_ENCODERS.get(base.name, ()) and _CLIP_LAYERS.fullmatch(path)
        return OriginalLayer(path) if is_known else None
    unmapped = _UNMAPPED.get(base.name)
    if component != "transformer" or (unmapped is not None and unmapped.fullmatch(path)):
        return None
    return base.published_names.original_layer(path)


def apply(layer: Layer, keys: Mapping[str, Tensor], *, base: Architecture) -> Result:
    """load_lora and calculate_weight, for the rows of one layer of diffusers."""
    keys = {key: tensor for key, tensor in keys.items() if key not in _OF_DIFFUSERS}
    place = place_of(layer.name, base)
    if place is None:
        reason = f"ComfyUI has no layer of the name {layer.name}; choose targets without it"
        return Result(layer.weight, layer.bias, frozenset(keys), reason)
    if place.num_rows not in (None, len(layer.weight)):
        reason = f"ComfyUI expects {place.num_rows} rows of {layer.name}, which has {len(layer.weight)}"
        return Result(layer.weight, layer.bias, frozenset(keys), reason)
    keys = {_LORA_ENDS.get(key, key): tensor for key, tensor in keys.items()}
    if place.swaps_halves and "dora_scale" in keys:
        # The change passes through swap_scale_shift, the magnitudes do not.
        keys["dora_scale"] = torch.cat(keys["dora_scale"].chunk(2)[::-1])
    result = comfyui.apply(layer, keys)
    if place.num_rows is None and not place.swaps_halves:
        return result
    # The key of the bias is made from that of the weight, which is no string here: nothing happens.
    ignored = {"diff_b", "b_norm"} & keys.keys()
    reason = ""
    if ignored:
        reason = (
            f"ComfyUI changes no bias of {layer.name}, whose rows are part of a larger weight or swapped; "
            "choose targets without it"
        )
    return Result(result.weight, layer.bias, result.ignored | ignored, reason)
