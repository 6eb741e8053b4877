"""PEFT's folders: `adapter_config.json` and `adapter_model.safetensors`; LoRA, DoRA, LoHa, LoKr, VeRA.

Source: huggingface/peft utils/save_and_load.py, tuners/{lora,loha,lokr,vera}/layer.py.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from diffadapt.common.messages import shorten_list
from diffadapt.formats.foreign.keys import tensors_by_layer
from diffadapt.formats.foreign.stored_change import ScalingRule, StoredChange, read_change

# names of layers, with at most one repetition: other patterns could take for ever to match
_SIMPLE_PATTERN = re.compile(r"\^?[\w.|\-\\]*([*+][\w.|\-\\]*)?\$?")
_LONGEST_NAME = 512
CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
TYPES = ("LORA", "LOHA", "LOKR", "VERA")
PREFIX = "base_model.model."
_ALPHA_OPTIONS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
# options that change what the tensors mean
_UNSUPPORTED_OPTIONS = (
    "fan_in_fan_out",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "arrow_config",
    "kasa_config",
    "target_parameters",
)
# values of init_lora_weights that change the base
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read(tensors: Mapping[str, Tensor], config_path: Path, path: Path) -> dict[str, StoredChange]:
    """The change of every layer.

    Raises:
        ValueError: another type of adapter, an option that is not supported, or keys of no known kind.
    """
    config = _read_config(config_path)
    is_vera = config["peft_type"] == "VERA"
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    if is_vera:
        tensors = _vera_as_lora(tensors, config, path)
    layers, unknown_keys = tensors_by_layer(tensors, with_replacements=True)
    changes: dict[str, StoredChange] = {}
    for layer, by_role in layers.items():
        changes[layer], unused_keys = read_change(layer, by_role, peft_scaling(config, layer))
        unknown_keys += unused_keys
        if is_vera:
            changes[layer] = replace(changes[layer], down_is_shared=True)
    if unknown_keys:
        raise ValueError(f"{path} has keys of no known kind of adapter: {shorten_list(sorted(unknown_keys))}")
    return changes


def peft_scaling(config: Mapping[str, object], layer: str) -> ScalingRule:
    """PEFT's scaling: alpha over the rank or its root; patterns by layer name; a tensor's alpha first."""
    peft_type = str(config.get("peft_type") or "LORA")

    def scaling(_: str, rank: int | None, stored_alpha: float | None) -> float:
        # factors show their rank; a LoKr of two whole factors has the option's
        layer_rank = rank or _by_pattern(config, "rank_pattern", layer, config.get("r", 8))
        alpha = stored_alpha
        if alpha is None:
            default = config.get(_ALPHA_OPTIONS.get(peft_type, ""), layer_rank)
            alpha = _by_pattern(config, "alpha_pattern", layer, default)
        _check_number("rank", layer_rank, layer, above=0)
        _check_number("alpha", alpha, layer, above=-math.inf)
        # rank-stabilised: alpha / sqrt(r), Kalajdzievski 2023, arXiv 2312.03732
        return float(alpha) / (math.sqrt(layer_rank) if config.get("use_rslora") else layer_rank)

    return scaling


def _check_number(option: str, value: object, layer: str, *, above: float) -> None:
    if type(value) not in (int, float) or not above < value <= sys.float_info.max:
        raise ValueError(f"{layer} has the {option} {value!r} in PEFT's configuration")


def _by_pattern(config: Mapping[str, object], option: str, layer: str, default: object) -> object:
    """The value of the first pattern that is the layer's name or the end of it, read as PEFT does."""
    patterns = config.get(option) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{option} of PEFT's configuration must be an object, got {patterns!r}")
    for pattern, value in patterns.items():
        if len(layer) > _LONGEST_NAME or not _SIMPLE_PATTERN.fullmatch(pattern):
            raise ValueError(f"{option} of PEFT's configuration has {pattern!r}, which is not supported")
        if _matches(pattern, layer):
            return value
    return default


def _matches(pattern: str, layer: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", layer) is not None
    except re.error as error:
        raise ValueError(f"PEFT's configuration has the pattern {pattern!r}: {error}") from error


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        peft_type = config["peft_type"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not PEFT's configuration of an adapter ({error!r})") from error
    if peft_type not in TYPES:
        raise ValueError(
            f"{path} is of type {peft_type}, which is not supported; {', '.join(TYPES)} are opened, "
            f"others can be trained as the adapter 'peft:{peft_type}'"
        )
    for option in _UNSUPPORTED_OPTIONS:
        if config.get(option):
            raise ValueError(f"{path} uses {option}={config[option]!r}, which is not supported")
    # these take something out of the base weights, which the file does not hold
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(_BASE_CHANGING_INITS):
        raise ValueError(
            f"{path}: init_lora_weights={init!r} changed the base weights; save it with "
            "path_initial_model_for_weight_conversion, which makes it a LoRA of the original base"
        )
    return config


def _vera_as_lora(
    tensors: Mapping[str, Tensor], config: Mapping[str, object], path: Path
) -> dict[str, Tensor]:
    """The same tensors with each layer's VeRA as a LoRA.

    VeRA's change is `diag(lambda_b) vera_B diag(lambda_d) vera_A`, with frozen matrices that all layers
    share: each takes as many rows of `vera_B` as it has outputs, and columns of `vera_A` as it has inputs.
    """
    tensors = dict(tensors)
    rank = config.get("r", 256)
    vera_a = _pop_by_end(tensors, "vera_A", path)  # (rank, largest fan_in)
    vera_b = _pop_by_end(tensors, "vera_B", path)  # (largest out, rank)
    if vera_a.dim() != 2 or vera_b.dim() != 2:
        raise ValueError(f"{path}: vera_A and vera_B must be matrices")
    end = ".vera_lambda_b"
    for layer in sorted(key.removesuffix(end) for key in tensors if key.endswith(end)):
        lambda_b = tensors.pop(f"{layer}.vera_lambda_b")  # (out,)
        lambda_d = tensors.pop(f"{layer}.vera_lambda_d", torch.empty(0))  # (rank,)
        if not lambda_d.shape == vera_a.shape[:1] == vera_b.shape[1:] == (rank,):
            raise ValueError(f"{path}: {layer} does not have the rank {rank!r} of the configuration")
        if lambda_b.dim() != 1 or len(lambda_b) > len(vera_b):
            raise ValueError(f"{path}: {layer} has more outputs than vera_B, or of another shape")
        tensors[f"{layer}.lora_B.weight"] = lambda_b[:, None] * vera_b[: len(lambda_b)] * lambda_d
        tensors[f"{layer}.lora_A.weight"] = vera_a  # cut to the layer's inputs once they are known
        tensors[f"{layer}.alpha"] = torch.tensor(float(rank))
    return tensors


def _pop_by_end(tensors: dict[str, Tensor], end: str, path: Path) -> Tensor:
    for key in tensors:
        if key.endswith(end):
            return tensors.pop(key)
    raise ValueError(
        f"{path} lacks the frozen matrices vera_A and vera_B; save it with save_projection=True, since "
        "they cannot be drawn again without the sizes of the model PEFT saw"
    )
