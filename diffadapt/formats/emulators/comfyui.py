"""ComfyUI 0.3.77: comfy/lora.py and comfy/weight_adapter/{base,lora,loha,lokr}.py.

Its newer weight_decompose is restated; versions before 0.3.40 know ``dora_scale`` on the input axis only.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffadapt.formats.emulators import Layer, Program, Refused, Result, unused, with_bias


def apply(layer: Layer, keys: Mapping[str, Tensor]) -> Result:
    """load_lora and calculate_weight: one patch for the weight, the last kind found; one for the bias."""
    weight, bias, used = layer.weight, layer.bias, set()
    for names, patch in (
        (("lora_up.weight", "lora_down.weight"), _lora),
        (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _loha),
        (("lokr_w1",), _lokr),
    ):
        if all(name in keys for name in names):
            used |= {"alpha", "dora_scale", *names} | _further(patch)
            weight = patch(layer.weight, keys)
    for weight_key, bias_key in (("w_norm", "b_norm"), ("diff", "diff_b")):
        if weight_key in keys:
            used.add(weight_key)
            if keys[weight_key].shape == layer.weight.shape:  # else: a warning, and not merged
                weight = layer.weight + keys[weight_key]
        if bias_key in keys and (bias_key == "diff_b" or weight_key in keys) and layer.bias is not None:
            used.add(bias_key)  # a layer without a bias has nothing the patch could go to
            bias = with_bias(layer.bias, keys[bias_key])
    return Result(weight, bias, unused(keys, used))


def _further(patch: object) -> set[str]:
    return {
        _lora: {"lora_mid.weight"},
        _loha: {"hada_t1", "hada_t2"},
        _lokr: {"lokr_w2", "lokr_w2_a", "lokr_w2_b"},
    }[patch]


def _lora(weight: Tensor, keys: Mapping[str, Tensor]) -> Tensor:
    mat1, mat2 = keys["lora_up.weight"], keys["lora_down.weight"]
    scale = keys["alpha"].item() / mat2.shape[0] if "alpha" in keys else 1.0
    mid = keys.get("lora_mid.weight")
    if mid is not None:
        if mid.dim() != 4:
            raise Refused("ComfyUI reads lora_mid on convolutions only (IndexError)")
        # it reads the rows of the product as if mid had as many outputs as inputs
        final_shape = [mat2.shape[1], mat2.shape[0], mid.shape[2], mid.shape[3]]
        product = mat2.transpose(0, 1).flatten(1) @ mid.transpose(0, 1).flatten(1)
        if product.numel() != mat2.shape[1] * mat2.shape[0] * mid.shape[2] * mid.shape[3]:
            raise Refused("ComfyUI needs as many outputs as inputs in lora_mid (RuntimeError)")
        mat2 = product.reshape(final_shape).transpose(0, 1)
    change = mat1.flatten(1) @ mat2.flatten(1)
    return _patched(weight, change, scale, keys)


def _loha(weight: Tensor, keys: Mapping[str, Tensor]) -> Tensor:
    w1b = keys["hada_w1_b"]
    scale = keys["alpha"].item() / w1b.shape[0] if "alpha" in keys else 1.0
    change = (keys["hada_w1_a"] @ w1b) * (keys["hada_w2_a"] @ keys["hada_w2_b"])
    return _patched(weight, change, scale, keys)


def _lokr(weight: Tensor, keys: Mapping[str, Tensor]) -> Tensor:
    w1, w2, scale = keys["lokr_w1"], keys.get("lokr_w2"), 1.0
    if w2 is None:
        w2 = keys["lokr_w2_a"] @ keys["lokr_w2_b"]
        if "alpha" in keys:
            scale = keys["alpha"].item() / keys["lokr_w2_b"].shape[0]
    if w2.dim() == 4:
        w1 = w1[:, :, None, None]
    return _patched(weight, torch.kron(w1, w2), scale, keys)


def _patched(weight: Tensor, change: Tensor, scale: float, keys: Mapping[str, Tensor]) -> Tensor:
    if change.numel() != weight.numel():
        return weight  # an error in the log, and the layer stays
    changed = weight + scale * change.reshape(weight.shape)
    if "dora_scale" not in keys:
        return changed
    magnitude = keys["dora_scale"]
    if magnitude.shape[0] == weight.shape[0]:  # on the output axis it divides by the norm of the old weight
        norm = weight.flatten(1).norm(dim=1)
        norm = norm.reshape(-1, *(1,) * (weight.dim() - 1))
    else:
        norm = changed.transpose(0, 1).flatten(1).norm(dim=1)
        norm = norm.reshape(-1, *(1,) * (weight.dim() - 1)).transpose(0, 1)
    return changed * (magnitude / (norm + torch.finfo(torch.float32).eps))


COMFYUI = Program("ComfyUI", "0.3.77", apply)
