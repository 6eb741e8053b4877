"""diffusers 0.42.1 with PEFT 0.21.2: loaders/lora_pipeline.py; tuners/lora/{layer,dora}.py."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from diffadapt.formats.emulators import Layer, Program, Refused, Result, unused, with_bias
from diffadapt.formats.emulators.lycoris import factorization

_LOKR_FACTORS = ("w1", "w2", "w2_a", "w2_b")
# ends of keys of text encoders, and PEFT's names for them
_PEFT_ENDS = {
    "lora_linear_layer.down.weight": "lora_A.weight",
    "lora_linear_layer.up.weight": "lora_B.weight",
}
_PASSING_OVER = ("flux", "chroma")
_WITH_LOKR = ("flux2_klein", "flux2_dev", "z_image")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def apply(layer: Layer, keys: Mapping[str, Tensor]) -> Result:
    """One LoRA layer: `y += lora_B(lora_A(x)) * alpha / r`, alpha = r; DoRA scales rows."""
    down = keys.get("lora_A.weight")
    up = keys.get("lora_B.weight")
    if down is None or up is None:
        raise Refused(f"PEFT needs lora_A and lora_B for {layer.name}")
    refusal = geometry_refusal(layer.module)
    if layer.kind not in ("linear", "conv") or refusal:
        raise Refused(
            refusal or f"diffusers loads LoRA on Linear and convolution layers, not on {layer.kind}s"
        )
    weight = layer.weight + (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
    lora_bias = keys.get("lora_B.bias")
    magnitude = keys.get("lora_magnitude_vector")
    if magnitude is not None:
        if lora_bias is not None:
            raise Refused("PEFT does not support lora_bias with DoRA")
        # m V / |V| by rows, with V = W + up down
        norm = weight.flatten(1).norm(dim=1)  # (out,)
        weight = weight * _per_row(magnitude, weight) / _per_row(norm, weight)
    bias = with_bias(layer.bias, lora_bias)
    read = {"lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"}
    return Result(weight, bias, unused(keys, read))


def apply_kohya(layer: Layer, keys: Mapping[str, Tensor]) -> Result:
    """lora_state_dict and _convert_non_diffusers_lora_to_diffusers: a file with kohya's names.

    `dora_scale` is dropped with a warning, every other key that is not of a plain LoRA refuses the file.
    """
    names = {"lora_up.weight", "lora_down.weight", "alpha"}
    unknown = set(keys) - names - {"dora_scale"}
    if unknown or not {"lora_up.weight", "lora_down.weight"} <= set(keys):
        raise Refused("diffusers knows plain LoRA keys only there (ValueError: not correctly renamed)")
    up = keys["lora_up.weight"]
    down = keys["lora_down.weight"]
    if "alpha" in keys:
        up = up * (keys["alpha"].item() / down.shape[0])
    result = apply(layer, {"lora_A.weight": down, "lora_B.weight": up})
    return Result(result.weight, result.bias, unused(keys, names))


def open_transformer_file(tensors: Mapping[str, Tensor], family: str) -> Program:
    """load_lora_weights of a family's pipeline on a file with the names of diffusers.

    `dora_scale` is dropped with a warning. FLUX.1 and Chroma pass over keys that are not of LoRA, FLUX.2 and
    Z-Image read LoKr too, all others refuse such keys.

    Raises:
        Refused: the pipeline opens no such file.
    """
    keys = [key for key in tensors if "dora_scale" not in key]
    is_lokr = any(".lokr_" in key for key in keys)
    methods = ("lora", "lokr") if family in _WITH_LOKR else ("lora",)
    unknown_keys = []
    for key in keys:
        if not any(method in key for method in methods):
            unknown_keys.append(key)
    passes_over = family in _PASSING_OVER and len(unknown_keys) < len(keys)
    if unknown_keys and not passes_over:
        raise Refused(
            f"diffusers opens no file with keys such as {unknown_keys[0]} (ValueError: Invalid checkpoint)"
        )
    if is_lokr:
        _check_lokr(tensors)
    return Program("diffusers", "0.42.1", partial(_apply_transformer, is_lokr=is_lokr))


def _apply_transformer(layer: Layer, keys: Mapping[str, Tensor], *, is_lokr: bool) -> Result:
    """One layer of a file; a file with LoKr keys is read as LoKr alone."""
    keys = {_PEFT_ENDS.get(key, key): tensor for key, tensor in keys.items() if key != "dora_scale"}
    if not is_lokr and "lora_A.weight" in keys:
        return apply(layer, keys)
    if not is_lokr or "lokr_w1" not in keys:
        return Result(layer.weight, layer.bias, frozenset(keys))
    second = keys["lokr_w2"] if "lokr_w2" in keys else keys["lokr_w2_a"] @ keys["lokr_w2_b"]
    weight = layer.weight + torch.kron(keys["lokr_w1"], second)
    return Result(weight, layer.bias, unused(keys, {f"lokr_{name}" for name in _LOKR_FACTORS}))


def _check_lokr(tensors: Mapping[str, Tensor]) -> None:
    """_create_lokr_config: PEFT takes one factor for all layers, which must give the splits in the file."""
    row_splits = []
    column_splits = []
    for layer in sorted({key.partition(".lokr_")[0] for key in tensors if ".lokr_" in key}):
        first, second, up, down = (tensors.get(f"{layer}.lokr_{name}") for name in _LOKR_FACTORS)
        rows, columns = second.shape if second is not None else (up.shape[0], down.shape[1])
        if up is not None and up.shape[1] >= max(rows, columns) / 2:
            raise Refused(f"PEFT makes no factors of rank {up.shape[1]} of {layer} (RuntimeError)")
        row_splits.append((first.shape[0], rows))
        column_splits.append((first.shape[1], columns))
    # A fixed factor is the first one's rows wherever it divides them.
    factors = sorted({first_rows for first_rows, _ in row_splits})
    for factor in (*factors, -1):
        splits = (*row_splits, *column_splits)
        if all(_split(first * second, factor) == (first, second) for first, second in splits):
            return
    raise Refused("diffusers finds no factor that gives the LoKr splits of the file (ValueError)")


def _split(dimension: int, factor: int) -> tuple[int, int]:
    """PEFT's `factorization`: as LyCORIS', but the factor first where it divides the dimension."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    return factorization(dimension, factor)


def geometry_refusal(module: nn.Module) -> str | None:
    """Why PEFT's LoRA on a layer is not the layer with another weight; None where it is."""
    if not isinstance(module, _CONVOLUTIONS):
        return None
    if any(step != 1 for step in module.dilation):
        return f"PEFT's LoRA forgets the dilation {tuple(module.dilation)} of a convolution"
    if module.padding_mode != "zeros":
        return f"PEFT's LoRA pads with zeros where the convolution's padding mode is {module.padding_mode!r}"
    if module.groups != 1:
        return f"PEFT's LoRA of a convolution with {module.groups} groups is another function"
    return None


def _per_row(vector: Tensor, like: Tensor) -> Tensor:
    """A vector `(out,)` shaped to multiply a weight."""
    return vector.reshape(-1, *(1,) * (like.dim() - 1))


DIFFUSERS = Program("diffusers", "0.42.1", apply)
DIFFUSERS_KOHYA = Program("diffusers", "0.42.1", apply_kohya)
