"""diffusers' `pytorch_lora_weights.safetensors`, in all spellings it has had.

`unet.<path>.lora_A.weight`, `.lora.down.weight`, `.processor.to_q_lora.down.weight`, and for text
encoders `.lora_linear_layer.down.weight`. Source: huggingface/diffusers utils/state_dict_utils.py and
loaders/lora_base.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from diffadapt.common.messages import shorten_list
from diffadapt.formats.foreign.keys import check_supported, name_magnitude, tensors_by_layer
from diffadapt.formats.foreign.peft import peft_scaling
from diffadapt.formats.foreign.stored_change import StoredChange, kohya_scaling, read_change

TENSORS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
_SPELLINGS = (
    *(".lora_A.", ".lora_B.", ".lora.down.", ".lora.up."),
    *("_lora.down.", "_lora.up.", ".lora_linear_layer."),
)


def has_diffusers_keys(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any key has one of diffusers' or PEFT's spellings."""
    return any(spelling in key for key in tensors for spelling in _SPELLINGS)


def read(tensors: Mapping[str, Tensor], header: Mapping[str, str], path: Path) -> dict[str, StoredChange]:
    """The change of every layer; alpha from the header's metadata, else from the tensors, else the rank.

    Raises:
        ValueError: keys belong to no known kind of adapter; the message names them.
    """
    configs = _read_configs(header, path)
    # files of PEFT without its folder have this level
    tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    layers, unknown_keys = tensors_by_layer(tensors)
    changes: dict[str, StoredChange] = {}
    for layer, by_role in layers.items():
        name_magnitude(by_role, header)
        # the configuration is by component: unet.r, text_encoder.r
        component, _, path_inside = layer.partition(".")
        scaling = kohya_scaling
        if component in configs:
            scaling = peft_scaling(configs[component], path_inside)
        changes[layer], unused_keys = read_change(layer, by_role, scaling)
        unknown_keys += unused_keys
    check_supported(unknown_keys, path)
    if unknown_keys:
        raise ValueError(f"{path} has keys of no known kind of adapter: {shorten_list(sorted(unknown_keys))}")
    return changes


def _read_configs(header: Mapping[str, str], path: Path) -> dict[str, dict]:
    """PEFT's configuration of each component, from keys such as `unet.lora_alpha`."""
    if METADATA not in header:
        return {}
    configs: dict[str, dict] = {}
    try:
        for key, value in json.loads(header[METADATA]).items():
            component, _, option = key.partition(".")
            configs.setdefault(component, {})[option] = value
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: its {METADATA} is not a JSON object ({error})") from error
    return configs
