"""diffusers 0.42.1 with PEFT 0.21.2: loaders/lora_pipeline.py; tuners/lora/{layer,dora}.py."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from diffadapt.formats.emulators import Layer, Program, Refused, Result, unused, with_bias

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
