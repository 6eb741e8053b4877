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
        read = {"lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "dora_scale"}
    elif "hada_w1_a" in keys:
        change = _loha(keys)
        read = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha", "dora_scale"}
    elif "lokr_w1" in keys:
        change = _lokr(layer, keys)
        read = {"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "alpha", "dora_scale"}
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
        norm = weight.flatten(1).norm(dim=1).reshape(-1, *(1,) * (weight.dim() - 1))  # (out, 1, ...)
        weight = weight * (keys["dora_scale"] / (norm + torch.finfo(torch.float32).eps))
    return Result(weight, layer.bias, unused(keys, read))


def _scale(keys: Mapping[str, Tensor], rank: int) -> float:
    if "alpha" not in keys:
        raise Refused("LyCORIS needs alpha (TypeError)")
    return keys["alpha"].item() / rank


def _locon(layer: Layer, keys: Mapping[str, Tensor]) -> Tensor:
    if layer.kind not in ("linear", "conv"):
        raise Refused(f"LyCORIS has no LoRA for a layer of kind {layer.kind}")
    up = keys["lora_up.weight"]
    down = keys["lora_down.weight"]
    core = keys.get("lora_mid.weight")
    rank = down.shape[0]
    scale = _scale(keys, rank)
    if core is None:
        return scale * (up.flatten(1) @ down.flatten(1))
    if layer.weight.dim() < 4 or all(size == 1 for size in layer.weight.shape[2:]):
        raise Refused("LyCORIS makes no lora_mid for a kernel of size 1 (AttributeError)")
    if core.shape[:2] != (rank, rank) or up.shape[1] != rank:
        raise Refused("LyCORIS makes lora_mid with the rank of lora_down on both sides (RuntimeError)")
    inner = torch.einsum("ab...,bi->ai...", core, down.flatten(1))  # (r, in, *kernel)
    return scale * (up.flatten(1) @ inner.flatten(1))


def _loha(keys: Mapping[str, Tensor]) -> Tensor:
    scale = _scale(keys, keys["hada_w1_b"].shape[0])
    product = (keys["hada_w1_a"] @ keys["hada_w1_b"]) * (keys["hada_w2_a"] @ keys["hada_w2_b"])
    return scale**2 * product  # get_diff_weight scales what get_weight has scaled


def _lokr(layer: Layer, keys: Mapping[str, Tensor]) -> Tensor:
    first = keys["lokr_w1"]
    second = keys.get("lokr_w2")
    kernel = layer.weight[0, 0].numel()
    if second is None:
        rank = keys["lokr_w2_a"].shape[1]
        second_shape = (keys["lokr_w2_a"].shape[0], keys["lokr_w2_b"].shape[1] // kernel)
    else:
        rank = None
        second_shape = (second.shape[0], second.shape[1])
    if not split_read_from(tuple(first.shape), second_shape, rank, kernel):
        raise Refused(
            f"LyCORIS guesses another split of {tuple(layer.weight.shape)} than {tuple(first.shape)}"
        )
    if second is None:
        scale = _scale(keys, rank)
        return scale**2 * torch.kron(first, keys["lokr_w2_a"] @ keys["lokr_w2_b"])
    if second.dim() == 4:
        first = first[:, :, None, None]
    return torch.kron(first, second)


def split_read_from(
    first: tuple[int, int], second: tuple[int, int], rank: int | None, kernel: int = 1
) -> bool:
    """Whether LokrModule.make_module_from_state_dict, which knows shapes alone, comes to the same split.

    Args:
        first: rows and columns of the first factor.
        second: rows and columns of the second factor, without the kernel.
        rank: of the product that the second factor is; None for a whole one.
        kernel: number of values of the kernel.
    """
    first_rows, first_columns = first
    second_rows, second_columns = second
    # of two flat factors it takes the width with the kernel in it for the width
    read_columns = second_columns if rank is None else second_columns * kernel
    has_default_rows = first_rows == factorization(first_rows * second_rows, -1)[0]
    has_default_columns = first_columns == factorization(first_columns * read_columns, -1)[0]
    if has_default_rows and has_default_columns:
        factor = -1
    else:
        factor = _guessed_factor(first, (second_rows, read_columns))
    row_split = factorization(first_rows * second_rows, factor)
    column_split = factorization(first_columns * second_columns, factor)
    if (row_split[0], column_split[0]) != first or (row_split[1], column_split[1]) != second:
        return False
    return rank is None or rank < max(second) / 2  # larger ranks are not decomposed


def _guessed_factor(first: tuple[int, int], second: tuple[int, int]) -> int:
    """The option `factor` that would give factors of these sizes."""
    rows = first[0] * second[0]
    columns = first[1] * second[1]
    candidates = (max(first), max(second))
    for factor in candidates:
        divides_both = rows % factor == 0 and columns % factor == 0
        if divides_both and factor in (first[0], second[0]) and factor in (first[1], second[1]):
            return factor
    return min(candidates)


def factorization(dimension: int, factor: int) -> tuple[int, int]:
    """functional/general.py: two divisors, the smaller first."""
    if factor > 0 and dimension % factor == 0:
        small, large = sorted((factor, dimension // factor))
        return small, large
    limit = dimension if factor < 0 else factor
    small = 1
    large = dimension
    smallest_sum = small + large
    while small < large:
        divisor = small + 1
        while dimension % divisor:
            divisor += 1
        if divisor + dimension // divisor > smallest_sum or divisor > limit:
            break
        small, large = divisor, dimension // divisor
    return min(small, large), max(small, large)


LYCORIS = Program("LyCORIS", "4.1.3", apply)
