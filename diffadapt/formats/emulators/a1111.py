"""stable-diffusion-webui ("A1111") 1.10.1: extensions-builtin/Lora/network*.py."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffadapt.formats.emulators import Layer, Program, Refused, Result, unused, with_bias

_LORA_KEYS = {"lora_up.weight", "lora_down.weight"}
_LOHA_KEYS = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_LOKR_SECOND_KEYS = {"lokr_w2_a", "lokr_w2_b"}
_NORM_KEYS = {"w_norm", "b_norm"}


def apply(layer: Layer, keys: Mapping[str, Tensor]) -> Result:
    """load_network: the first module type that accepts a layer's keys takes the layer, in this order."""
    present = set(keys)
    bias_change = None
    rank = None  # of the factors that alpha is divided by
    if present >= _LORA_KEYS:
        if layer.kind == "norm":
            raise Refused("A1111 has no LoRA for norms (AssertionError)")
        read = _LORA_KEYS | {"lora_mid.weight"}
        change = _lora(layer, keys)
        rank = keys["lora_down.weight"].shape[0]
    elif present >= _LOHA_KEYS:
        read = _LOHA_KEYS
        change = (keys["hada_w1_a"] @ keys["hada_w1_b"]) * (keys["hada_w2_a"] @ keys["hada_w2_b"])
        rank = keys["hada_w1_b"].shape[0]
    elif "lokr_w1" in keys and ("lokr_w2" in keys or present >= _LOKR_SECOND_KEYS):
        read = {"lokr_w1", "lokr_w2"} | _LOKR_SECOND_KEYS
        change, rank = _lokr(keys)
    elif "diff" in keys:
        read = {"diff", "diff_b"}
        change = keys["diff"]
        bias_change = keys.get("diff_b")
    elif present >= _NORM_KEYS:
        read = _NORM_KEYS
        change = keys["w_norm"]
        bias_change = keys["b_norm"]
    else:
        listed = ", ".join(sorted(keys))
        raise Refused(f"A1111 has no module type for {layer.name} with {listed} alone (AssertionError)")
    scale = 1.0
    if rank is not None and "alpha" in keys:
        scale = keys["alpha"].item() / rank
    change = scale * change.reshape(layer.weight.shape)
    weight = layer.weight + _finalized(layer.weight, change, keys)
    bias = with_bias(layer.bias, bias_change)
    return Result(weight, bias, unused(keys, read | {"alpha", "dora_scale"}))


def _lora(layer: Layer, keys: Mapping[str, Tensor]) -> Tensor:
    up = keys["lora_up.weight"].flatten(1)
    down = keys["lora_down.weight"].flatten(1)
    core = keys.get("lora_mid.weight")
    if core is None:
        return up @ down
    # rebuild_cp_decomposition
    return torch.einsum("nmkl,in,mj->ijkl", core, up, down)


def _lokr(keys: Mapping[str, Tensor]) -> tuple[Tensor, int | None]:
    """The Kronecker product, and the rank of its second factor; None where that is whole."""
    first = keys["lokr_w1"]
    second = keys.get("lokr_w2")
    rank = None
    if second is None:
        second = keys["lokr_w2_a"] @ keys["lokr_w2_b"]
        rank = keys["lokr_w2_b"].shape[0]
    if second.dim() == 4:
        first = first[:, :, None, None]
    return torch.kron(first, second), rank


def _finalized(weight: Tensor, change: Tensor, keys: Mapping[str, Tensor]) -> Tensor:
    """finalize_updown: dora_scale is read on the input axis, whatever its shape."""
    if "dora_scale" not in keys:
        return change
    merged = weight + change
    norm = merged.transpose(0, 1).flatten(1).norm(dim=1)  # (in,)
    norm = norm.reshape(-1, *(1,) * (weight.dim() - 1)).transpose(0, 1)  # (1, in, 1, ...)
    return merged * (keys["dora_scale"] / norm) - weight


A1111 = Program("A1111", "1.10.1", apply)
