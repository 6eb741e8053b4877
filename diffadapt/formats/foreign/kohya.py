"""Files of kohya's scripts, LyCORIS, OneTrainer, ComfyUI: `lora_unet_<path, underscores>.lora_down.weight`.

Sources: kohya-ss/sd-scripts networks/lora.py; KohakuBlueleaf/LyCORIS modules/*.py; ComfyUI weight_adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from diffadapt.common.messages import shorten_list
from diffadapt.formats.foreign.keys import check_supported, name_magnitude, tensors_by_layer
from diffadapt.formats.foreign.stored_change import StoredChange, kohya_scaling, read_change


def read(tensors: Mapping[str, Tensor], header: Mapping[str, str], path: Path) -> dict[str, StoredChange]:
    """The change of every layer; `dora_scale` as LyCORIS means it, in our own exports as ComfyUI does.

    Raises:
        ValueError: keys belong to no known kind of adapter; the message names them.
    """
    layers, unknown_keys = tensors_by_layer(tensors)
    changes: dict[str, StoredChange] = {}
    for layer, by_role in layers.items():
        name_magnitude(by_role, header)
        changes[layer], unused_keys = read_change(layer, by_role, kohya_scaling)
        unknown_keys += unused_keys
    check_supported(unknown_keys, path)
    if not changes:
        raise ValueError(f"{path} is not a diffadapt file, and {_contents(unknown_keys)}")
    if unknown_keys:
        raise ValueError(
            f"{path} is not a diffadapt file, and not wholly LoRA, LoCon, LoHa, LoKr, DoRA, full or norms: "
            f"unknown keys {shorten_list(sorted(unknown_keys))}"
        )
    return changes


def _contents(keys: list[str]) -> str:
    """What a file without any tensor of an adapter holds."""
    if not keys:
        return "holds no tensors"
    examples = shorten_list(sorted(keys), limit=3)
    num_weights = sum(key.endswith((".weight", ".bias")) for key in keys)
    if num_weights > len(keys) / 2:  # others are parameters like CLIP's logit_scale
        return (
            f"holds the weights of a model, not an adapter (keys such as {examples}); if it is a fine-tuned "
            "model, `diffadapt extract` makes an adapter of its difference from the base"
        )
    return f"holds no adapter of a known kind (keys such as {examples})"
