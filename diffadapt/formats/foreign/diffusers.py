"""diffusers' ``pytorch_lora_weights.safetensors``, in all spellings it has had.

``unet.<path>.lora_A.weight``, ``.lora.down.weight``, ``.processor.to_q_lora.down.weight``, and for text
encoders ``.lora_linear_layer.down.weight``. Source: huggingface/diffusers utils/state_dict_utils.py and
loaders/lora_base.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from diffadapt.common.messages import shorten_list
from diffadapt.formats.foreign.keys import by_layer, unsupported
from diffadapt.formats.foreign.peft import config_rule
from diffadapt.formats.foreign.stored_change import Form, form_of, kohya_rule

TENSORS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
_OWN = (".lora_A.", ".lora_B.", ".lora.down.", ".lora.up.", "_lora.down.", "_lora.up.", ".lora_linear_layer.")


def recognised(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any key has one of diffusers' or PEFT's spellings."""
    return any(part in key for key in tensors for part in _OWN)


def read(tensors: Mapping[str, Tensor], header: Mapping[str, str], path: Path) -> dict[str, Form]:
    """Every layer's form; alpha from the header's metadata, else from the file's tensors, else the rank."""
    configs = _configs(header, path)
    plain = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    layers, left = by_layer(plain)
    forms: dict[str, Form] = {}
    for layer, roles in layers.items():
        component, _, inside = layer.partition(".")
        config = configs.get(component)
        rule = kohya_rule if config is None else config_rule(config, inside)
        forms[layer], unused = form_of(layer, roles, rule)
        left += unused
    if kinds := unsupported(left):
        raise ValueError(f"{path} holds {kinds}")
    if left:
        raise ValueError(f"{path} has keys of no known kind of adapter: {shorten_list(sorted(left))}")
    return forms


def _configs(header: Mapping[str, str], path: Path) -> dict[str, dict]:
    """PEFT's configuration of each component, from keys such as ``unet.lora_alpha``."""
    if METADATA not in header:
        return {}
    try:
        stored = json.loads(header[METADATA])
        items = [(*key.partition(".")[::2], value) for key, value in stored.items()]
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: its {METADATA} is not a JSON object ({error})") from error
    configs: dict[str, dict] = {}
    for component, option, value in items:
        configs.setdefault(component, {})[option] = value
    return configs
