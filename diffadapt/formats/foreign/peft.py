"""PEFT's folders: ``adapter_config.json`` and ``adapter_model.safetensors``; LoRA, DoRA, LoHa, LoKr, VeRA.

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
from diffadapt.formats.foreign.keys import by_layer
from diffadapt.formats.foreign.stored_change import Form, Rule, form_of

# names of layers, with at most one repetition: other patterns could take for ever to match
_SIMPLE_PATTERN = re.compile(r"\^?[\w.|\-\\]*([*+][\w.|\-\\]*)?\$?")
_LONGEST_NAME = 512
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TYPES = ("LORA", "LOHA", "LOKR", "VERA")
PREFIX = "base_model.model."
_ALPHA = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
# options that change what the tensors mean
_REFUSED = (
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
_MOVED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # init_lora_weights that change the base


def read(tensors: Mapping[str, Tensor], config_path: Path, path: Path) -> dict[str, Form]:
    """Every layer's form. Raises ValueError for another type, an option not understood, or keys left."""
    config = _read_config(config_path)
    named = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    if config["peft_type"] == "VERA":
        named = _without_vera(named, config, path)
    layers, left = by_layer(named, with_replaced=True)
    forms: dict[str, Form] = {}
    for layer, roles in layers.items():
        forms[layer], unused = form_of(layer, roles, config_rule(config, layer))
        left += unused
        if config["peft_type"] == "VERA":
            forms[layer] = replace(forms[layer], cut=True)
    if left:
        raise ValueError(f"{path} has keys of no known kind of adapter: {shorten_list(sorted(left))}")
    return forms


def config_rule(config: Mapping[str, object], layer: str) -> Rule:
    """PEFT's scaling: alpha over the rank or its root; patterns by layer name; a tensor's alpha first."""
    kind = str(config.get("peft_type") or "LORA")

    def rule(_: str, rank: int | None, stored: float | None) -> float:
        own_rank = rank or _by_pattern(config, "rank_pattern", layer, config.get("r", 8))
        usual = config.get(_ALPHA.get(kind, ""), own_rank)
        alpha = _by_pattern(config, "alpha_pattern", layer, usual) if stored is None else stored
        _check_number("rank", own_rank, layer, above=0)
        _check_number("alpha", alpha, layer, above=-math.inf)
        return float(alpha) / (math.sqrt(own_rank) if config.get("use_rslora") else own_rank)

    return rule


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
            raise ValueError(
                f"{option} of PEFT's configuration has {pattern!r}, which is not understood here"
            )
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
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not PEFT's configuration of an adapter ({error!r})") from error
    if kind not in TYPES:
        raise ValueError(
            f"{path} is of type {kind}; {', '.join(TYPES)} are opened, others can be trained as the "
            f"adapter 'peft:{kind}'"
        )
    used = [option for option in _REFUSED if config.get(option)]
    if used:
        raise ValueError(f"{path} uses {used[0]}={config[used[0]]!r}, which is not understood here")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(_MOVED_BASE):
        raise ValueError(
            f"{path}: init_lora_weights={start!r} changed the base weights; save it with "
            "path_initial_model_for_weight_conversion, which makes it a LoRA of the original base"
        )
    return config


def _without_vera(named: Mapping[str, Tensor], config: Mapping[str, object], path: Path) -> dict[str, Tensor]:
    """Each layer's two vectors and its slice of the shared matrices as one low-rank product."""
    rest, rank = dict(named), config.get("r", 256)
    lambdas = {key.removesuffix(".vera_lambda_b") for key in rest if key.endswith(".vera_lambda_b")}
    stored = {name: next((key for key in rest if key.endswith(name)), None) for name in ("vera_A", "vera_B")}
    if None in stored.values():
        raise ValueError(
            f"{path} lacks the frozen matrices vera_A and vera_B; save it with save_projection=True, since "
            "they cannot be drawn again without the sizes of the model PEFT saw"
        )
    shared_down, shared_up = (rest.pop(stored[name]) for name in ("vera_A", "vera_B"))
    if shared_down.dim() != 2 or shared_up.dim() != 2:
        raise ValueError(f"{path}: vera_A and vera_B must be matrices")
    for layer in sorted(lambdas):
        out_scale = rest.pop(f"{layer}.vera_lambda_b")
        rank_scale = rest.pop(f"{layer}.vera_lambda_d", torch.empty(0))
        if not rank_scale.shape == shared_down.shape[:1] == shared_up.shape[1:] == (rank,):
            raise ValueError(f"{path}: {layer} does not have the rank {rank!r} of the configuration")
        if out_scale.dim() != 1 or len(out_scale) > len(shared_up):
            raise ValueError(f"{path}: {layer} has more outputs than vera_B, or of another shape")
        rest[f"{layer}.lora_B.weight"] = out_scale[:, None] * shared_up[: len(out_scale)] * rank_scale
        rest[f"{layer}.lora_A.weight"] = shared_down  # cut to the layer's inputs once they are known
        rest[f"{layer}.alpha"] = torch.tensor(float(rank))
    return rest
