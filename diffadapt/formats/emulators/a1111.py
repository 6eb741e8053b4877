"""stable-diffusion-webui ("A1111") 1.10.1: extensions-builtin/Lora/network*.py."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffadapt.formats.emulators import Layer, Program, Refused, Result, unused, with_bias


def apply(layer: Layer, keys: Mapping[str, Tensor]) -> Result:
    """load_network: the first module type that accepts a layer's keys takes the layer, in this order."""
    if all(key in keys for key in ("lora_up.weight", "lora_down.weight")):
        if layer.kind == "norm":
            raise Refused("A1111 has no LoRA for norms (AssertionError)")
        used = {"lora_up.weight", "lora_down.weight", "lora_mid.weight"}
        change, rank = _lora(layer, keys), keys["lora_down.weight"].shape[0]
    elif all(key in keys for key in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")):
        used = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
        change = (keys["hada_w1_a"] @ keys["hada_w1_b"]) * (keys["hada_w2_a"] @ keys["hada_w2_b"])
        rank = keys["hada_w1_b"].shape[0]
    elif "lokr_w1" in keys and ("lokr_w2" in keys or all(f"lokr_w2_{key}" in keys for key in "ab")):
        used = {"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}
        change, rank = _lokr(keys)
    elif "diff" in keys:
        used = {"diff", "diff_b"}
        change, rank = keys["diff"], None
    elif all(key in keys for key in ("w_norm", "b_norm")):
        used = {"w_norm", "b_norm"}
        change, rank = keys["w_norm"], None
    else:
        listed = ", ".join(sorted(keys))
        raise Refused(f"A1111 has no module type for {layer.name} with {listed} alone (AssertionError)")
    scale = keys["alpha"].item() / rank if rank is not None and "alpha" in keys else 1.0
    weight = layer.weight + _finalized(layer.weight, scale * change.reshape(layer.weight.shape), keys)
    bias_change = keys.get("diff_b") if "diff" in used else keys.get("b_norm") if "b_norm" in used else None
    return Result(weight, with_bias(layer.bias, bias_change), unused(keys, used | {"alpha", "dora_scale"}))


def _lora(layer: Layer, keys: Mapping[str, Tensor]) -> Tensor:
    up, down = keys["lora_up.weight"], keys["lora_down.weight"]
    mid = keys.get("lora_mid.weight")
    if mid is None:
        return up.flatten(1) @ down.flatten(1)
    # rebuild_cp_decomposition
    return torch.einsum("nmkl,in,mj->ijkl", mid, up.flatten(1), down.flatten(1))


def _lokr(keys: Mapping[str, Tensor]) -> tuple[Tensor, int | None]:
    w1, w2 = keys["lokr_w1"], keys.get("lokr_w2")
    rank = None
    if w2 is None:
        w2, rank = keys["lokr_w2_a"] @ keys["lokr_w2_b"], keys["lokr_w2_b"].shape[0]
    if w2.dim() == 4:
        w1 = w1[:, :, None, None]
    return torch.kron(w1, w2), rank


def _finalized(weight: Tensor, change: Tensor, keys: Mapping[str, Tensor]) -> Tensor:
    """finalize_updown: dora_scale is read on the input axis, whatever its shape."""
    if "dora_scale" not in keys:
        return change
    merged = weight + change
    norm = merged.transpose(0, 1).flatten(1).norm(dim=1)
    norm = norm.reshape(-1, *(1,) * (weight.dim() - 1)).transpose(0, 1)
    return merged * (keys["dora_scale"] / norm) - weight


A1111 = Program("A1111", "1.10.1", apply)
