"""ComfyUI 0.3.77: comfy/lora.py and comfy/weight_adapter/{base,lora,loha,lokr}.py.

Its newer weight_decompose is restated; versions before 0.3.40 know `dora_scale` on the input axis only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from diffadapt.formats.emulators import Layer, Program, Refused, Result, unused, with_bias

Patch = Callable[[Tensor, Mapping[str, Tensor]], Tensor]  # from a weight and the keys to the new weight


def apply(layer: Layer, keys: Mapping[str, Tensor]) -> Result:
    """load_lora and calculate_weight: one patch for the weight, the last kind found; one for the bias."""
    weight = layer.weight
    bias = layer.bias
    read: set[str] = set()
    for required_keys, optional_keys, patch in _PATCHES:
        if all(key in keys for key in required_keys):
            read |= {"alpha", "dora_scale"} | required_keys | optional_keys
            weight = patch(layer.weight, keys)
    for weight_key, bias_key in (("w_norm", "b_norm"), ("diff", "diff_b")):
        if weight_key in keys:
            read.add(weight_key)
            if keys[weight_key].shape == layer.weight.shape:  # else: a warning, and not merged
                weight = layer.weight + keys[weight_key]
        # b_norm counts beside w_norm only
        has_bias_patch = bias_key in keys and (bias_key == "diff_b" or weight_key in keys)
        if has_bias_patch and layer.bias is not None:  # else the patch has nothing to go to
            read.add(bias_key)
            bias = with_bias(layer.bias, keys[bias_key])
    return Result(weight, bias, unused(keys, read))


def _lora(weight: Tensor, keys: Mapping[str, Tensor]) -> Tensor:
    up = keys["lora_up.weight"]
    down = keys["lora_down.weight"]
    scale = _scale(keys, rank=down.shape[0])
    core = keys.get("lora_mid.weight")
    if core is not None:
        if core.dim() != 4:
            raise Refused("ComfyUI reads lora_mid on convolutions only (IndexError)")
        rank, channels = down.shape[:2]
        height, width = core.shape[2:]
        # it reads the rows of the product as if the core had as many outputs as inputs
        product = down.transpose(0, 1).flatten(1) @ core.transpose(0, 1).flatten(1)
        if product.numel() != channels * rank * height * width:
            raise Refused("ComfyUI needs as many outputs as inputs in lora_mid (RuntimeError)")
        down = product.reshape(channels, rank, height, width).transpose(0, 1)
    change = up.flatten(1) @ down.flatten(1)
    return _patched(weight, change, scale, keys)


def _loha(weight: Tensor, keys: Mapping[str, Tensor]) -> Tensor:
    scale = _scale(keys, rank=keys["hada_w1_b"].shape[0])
    change = (keys["hada_w1_a"] @ keys["hada_w1_b"]) * (keys["hada_w2_a"] @ keys["hada_w2_b"])
    return _patched(weight, change, scale, keys)


def _lokr(weight: Tensor, keys: Mapping[str, Tensor]) -> Tensor:
    first = keys["lokr_w1"]
    second = keys.get("lokr_w2")
    scale = 1.0  # alpha counts where the second factor is a product
    if second is None:
        second = keys["lokr_w2_a"] @ keys["lokr_w2_b"]
        scale = _scale(keys, rank=keys["lokr_w2_b"].shape[0])
    if second.dim() == 4:
        first = first[:, :, None, None]
    return _patched(weight, torch.kron(first, second), scale, keys)


def _scale(keys: Mapping[str, Tensor], *, rank: int) -> float:
    return keys["alpha"].item() / rank if "alpha" in keys else 1.0


def _patched(weight: Tensor, change: Tensor, scale: float, keys: Mapping[str, Tensor]) -> Tensor:
    if change.numel() != weight.numel():
        return weight  # an error in the log, and the layer stays
    changed = weight + scale * change.reshape(weight.shape)
    if "dora_scale" not in keys:
        return changed
    magnitude = keys["dora_scale"]
    if magnitude.shape[0] == weight.shape[0]:  # on the output axis it divides by the norm of the old weight
        norm = weight.flatten(1).norm(dim=1)  # (out,)
        norm = norm.reshape(-1, *(1,) * (weight.dim() - 1))  # (out, 1, ...)
    else:
        norm = changed.transpose(0, 1).flatten(1).norm(dim=1)  # (in,)
        norm = norm.reshape(-1, *(1,) * (weight.dim() - 1)).transpose(0, 1)  # (1, in, 1, ...)
    return changed * (magnitude / (norm + torch.finfo(torch.float32).eps))


# keys that a kind of patch needs, and those that it reads beside them
_PATCHES: tuple[tuple[set[str], set[str], Patch], ...] = (
    ({"lora_up.weight", "lora_down.weight"}, {"lora_mid.weight"}, _lora),
    ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"hada_t1", "hada_t2"}, _loha),
    ({"lokr_w1"}, {"lokr_w2", "lokr_w2_a", "lokr_w2_b"}, _lokr),
)

COMFYUI = Program("ComfyUI", "0.3.77", apply)
