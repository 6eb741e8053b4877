"""kohya's sd-scripts, commit 48d368f: networks/lora.py, create_network_from_weights and LoRAModule."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from diffadapt.formats.emulators import Layer, Program, Result, unused


def apply(layer: Layer, keys: Mapping[str, Tensor]) -> Result:
    """`alpha / rank * up @ down` on Linear layers and convolutions; all other keys are ignored."""
    names = {"lora_up.weight", "lora_down.weight"}
    if not names <= set(keys) or layer.kind not in ("linear", "conv") or "lora_mid.weight" in keys:
        return Result(layer.weight, layer.bias, frozenset(keys))
    up = keys["lora_up.weight"]
    down = keys["lora_down.weight"]
    scale = keys["alpha"].item() / down.shape[0] if "alpha" in keys else 1.0
    change = scale * (up.flatten(1) @ down.flatten(1))
    weight = layer.weight + change.reshape(layer.weight.shape)
    return Result(weight, layer.bias, unused(keys, names | {"alpha"}))


SD_SCRIPTS = Program("sd-scripts", "48d368f", apply)
