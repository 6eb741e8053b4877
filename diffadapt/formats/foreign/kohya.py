"""Files of kohya's scripts, LyCORIS, OneTrainer, ComfyUI: ``lora_unet_<path, underscores>.lora_down.weight``.

Sources: kohya-ss/sd-scripts networks/lora.py; KohakuBlueleaf/LyCORIS modules/*.py; ComfyUI weight_adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from diffadapt.common.messages import shorten_list
from diffadapt.formats.foreign.keys import by_layer, unsupported
from diffadapt.formats.foreign.stored_change import Form, form_of, kohya_rule

OURS = "diffadapt.method"  # in the header of files we exported


def read(tensors: Mapping[str, Tensor], header: Mapping[str, str], path: Path) -> dict[str, Form]:
    """Every layer's form; ``dora_scale`` as LyCORIS means it, in our own exports as ComfyUI does.

    Raises: ValueError naming keys that fit no known kind of adapter.
    """
    layers, left = by_layer(tensors)
    forms: dict[str, Form] = {}
    for layer, roles in layers.items():
        if OURS in header and "dora_scale" in roles:
            roles["base_magnitude"] = roles.pop("dora_scale")
        forms[layer], unused = form_of(layer, roles, kohya_rule)
        left += unused
    if kinds := unsupported(left):
        raise ValueError(f"{path} holds {kinds}")
    if left or not forms:
        raise ValueError(
            f"{path} is not a diffadapt file, and not wholly LoRA, LoCon, LoHa, LoKr, DoRA, full or norms: "
            f"{'keys left: ' + shorten_list(sorted(left)) if left else 'it holds no tensors'}"
        )
    return forms
