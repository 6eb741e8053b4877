"""LyCORIS 4.1.3: lycoris/modules/{locon,loha,lokr,full,norms}.py and functional/general.py."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffadapt.formats.emulators import Layer, Program, Refused, Result, unused, with_bias


def apply(layer: Layer, keys: Mapping[str, Tensor]) -> Result:
    """get_module and make_module: the first algorithm that finds a telling key reads its own keys."""
    if "lora_up.weight" in keys:
        change = _locon(layer, keys)
        used = {"lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "dora_scale"}
    elif "hada_w1_a" in keys:
        change = _loha(keys)
        used = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha", "dora_scale"}
    elif "lokr_w1" in keys:
        change = _lokr(layer, keys)
        used = {"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "alpha", "dora_scale"}
    elif "diff" in keys:
        if layer.kind not in ("linear", "conv"):
            raise Refused(f"LyCORIS has no whole differences for layers of kind {layer.kind} (ValueError)")
        bias = with_bias(layer.bias, keys.get("diff_b"))
        return Result(layer.weight + keys["diff"], bias, unused(keys, {"diff", "diff_b"}))
    elif "w_norm" in keys:
        bias = with_bias(layer.bias, keys.get("b_norm"))
        return Result(layer.weight + keys["w_norm"], bias, unused(keys, {"w_norm", "b_norm"}))
    else:
        listed = ", ".join(sorted(keys))
        raise Refused(f"LyCORIS has no algorithm for {layer.name} with {listed} alone (AttributeError)")
    weight = layer.weight + change.reshape(layer.weight.shape)
    if "dora_scale" in keys:  # weight_decompose on the output axis, by the norm of the changed weight
        norm = weight.flatten(1).norm(dim=1).reshape(-1, *(1,) * (weight.dim() - 1))
        weight = weight * (keys["dora_scale"] / (norm + torch.finfo(torch.float32).eps))
    return Result(weight, layer.bias, unused(keys, used))


def _scale(keys: Mapping[str, Tensor], rank: int) -> float:
    if "alpha" not in keys:
        raise Refused("LyCORIS needs alpha (TypeError)")
    return keys["alpha"].item() / rank


def _locon(layer: Layer, keys: Mapping[str, Tensor]) -> Tensor:
    up, down, mid = keys["lora_up.weight"], keys["lora_down.weight"], keys.get("lora_mid.weight")
    if layer.kind not in ("linear", "conv"):
        raise Refused(f"LyCORIS has no LoRA for a layer of kind {layer.kind}")
    rank = down.shape[0]
    scale = _scale(keys, rank)
    if mid is None:
        return scale * (up.flatten(1) @ down.flatten(1))
    if layer.weight.dim() < 4 or all(size == 1 for size in layer.weight.shape[2:]):
        raise Refused("LyCORIS makes no lora_mid for a kernel of size 1 (AttributeError)")
    if mid.shape[:2] != (rank, rank) or up.shape[1] != rank:
        raise Refused("LyCORIS makes lora_mid with the rank of lora_down on both sides (RuntimeError)")
    inner = torch.einsum("ab...,bi->ai...", mid, down.flatten(1))
    return scale * (up.flatten(1) @ inner.flatten(1))


def _loha(keys: Mapping[str, Tensor]) -> Tensor:
    scale = _scale(keys, keys["hada_w1_b"].shape[0])
    product = (keys["hada_w1_a"] @ keys["hada_w1_b"]) * (keys["hada_w2_a"] @ keys["hada_w2_b"])
    return scale**2 * product  # get_diff_weight scales what get_weight has scaled


def _lokr(layer: Layer, keys: Mapping[str, Tensor]) -> Tensor:
    w1, w2 = keys["lokr_w1"], keys.get("lokr_w2")
    rank = None if w2 is not None else keys["lokr_w2_a"].shape[1]
    height = (keys["lokr_w2_a"] if w2 is None else w2).shape[0]
    kernel = layer.weight[0, 0].numel()
    width = keys["lokr_w2_b"].shape[1] // kernel if w2 is None else w2.shape[1]
    if not split_read_from(tuple(w1.shape), (height, width), rank, kernel):
        raise Refused(f"LyCORIS guesses another split of {tuple(layer.weight.shape)} than {tuple(w1.shape)}")
    if w2 is None:
        scale = _scale(keys, rank)
        return scale**2 * torch.kron(w1, keys["lokr_w2_a"] @ keys["lokr_w2_b"])
    return torch.kron(w1[:, :, None, None], w2) if w2.dim() == 4 else torch.kron(w1, w2)


def split_read_from(left: tuple[int, int], right: tuple[int, int], rank: int | None, kernel: int = 1) -> bool:
    """Whether LokrModule.make_module_from_state_dict, which knows shapes alone, comes to the same split.

    ``right`` is its rows and columns without the kernel; ``rank`` that of its factors, None for a whole one.
    """
    read_width = right[1] if rank is None else right[1] * kernel  # of the flat factor, kernel included
    (a, b), (c, d) = left, (right[0], read_width)
    if a == _factorization(a * c, -1)[0] and b == _factorization(b * d, -1)[0]:
        factor = -1
    else:
        factor = _guessed_factor(left, (c, d))
    sides = _factorization(a * c, factor), _factorization(b * right[1], factor)
    if (sides[0][0], sides[1][0]) != left or (sides[0][1], sides[1][1]) != right:
        return False
    return rank is None or rank < max(right) / 2


def _guessed_factor(left: tuple[int, int], right: tuple[int, int]) -> int:
    rows, columns = left[0] * right[0], left[1] * right[1]
    first, second = max(left), max(right)
    for factor in (first, second):
        fits = rows % factor == 0 and columns % factor == 0
        if fits and factor in (left[0], right[0]) and factor in (left[1], right[1]):
            return factor
    return min(first, second)


def _factorization(dimension: int, factor: int) -> tuple[int, int]:
    """functional/general.py: two divisors, the smaller first."""
    if factor > 0 and dimension % factor == 0:
        return min(factor, dimension // factor), max(factor, dimension // factor)
    limit = dimension if factor < 0 else factor
    small, large = 1, dimension
    total = small + large
    while small < large:
        new = next(n for n in range(small + 1, dimension + 1) if dimension % n == 0)
        if new + dimension // new > total or new > limit:
            break
        small, large = new, dimension // new
    return min(small, large), max(small, large)


LYCORIS = Program("LyCORIS", "4.1.3", apply)
