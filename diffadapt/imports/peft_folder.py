"""PEFT's folders: ``adapter_config.json`` and ``adapter_model.safetensors``; LoRA, DoRA, LoHa, LoKr, VeRA.

Source: huggingface/peft utils/save_and_load.py, tuners/{lora,loha,lokr,vera}/layer.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from diffadapt.imports.forms import Form, Rule, form_of
from diffadapt.imports.keys import by_layer, shorten

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
        raise ValueError(f"{path} has keys of no known kind of adapter: {shorten(left)}")
    return forms


def config_rule(config: Mapping[str, object], layer: str) -> Rule:
    """PEFT's scaling: alpha over the rank or its root; patterns by layer name; a tensor's alpha first."""
    kind = str(config.get("peft_type") or "LORA")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}

    def rule(_: str, rank: int | None, stored: float | None) -> float:
        own_rank = rank or _by_pattern(ranks, layer, config.get("r", 8))
        usual = config.get(_ALPHA.get(kind, ""), own_rank)
        alpha = _by_pattern(alphas, layer, usual) if stored is None else stored
        return float(alpha) / (math.sqrt(own_rank) if config.get("use_rslora") else own_rank)

    return rule


def _by_pattern(patterns: Mapping[str, float], layer: str, default: float) -> float:
    """The first pattern that is the layer's name or the end of it, read as PEFT does."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text())
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
    rest, rank = dict(named), int(config.get("r", 256))
    lambdas = {key.removesuffix(".vera_lambda_b") for key in rest if key.endswith(".vera_lambda_b")}
    stored = {name: next((key for key in rest if key.endswith(name)), None) for name in ("vera_A", "vera_B")}
    if None in stored.values():
        raise ValueError(
            f"{path} lacks the frozen matrices vera_A and vera_B; save it with save_projection=True, since "
            "they cannot be drawn again without the sizes of the model PEFT saw"
        )
    shared_down, shared_up = (rest.pop(stored[name]) for name in ("vera_A", "vera_B"))
    for layer in sorted(lambdas):
        out_scale = rest.pop(f"{layer}.vera_lambda_b")
        rank_scale = rest.pop(f"{layer}.vera_lambda_d", torch.empty(0))
        if rank_scale.shape != (rank,) or shared_down.shape[0] != rank or shared_up.shape[1] != rank:
            raise ValueError(f"{path}: {layer} does not have the rank {rank} of the configuration")
        rest[f"{layer}.lora_B.weight"] = out_scale[:, None] * shared_up[: len(out_scale)] * rank_scale
        rest[f"{layer}.lora_A.weight"] = shared_down  # cut to the layer's inputs once they are known
        rest[f"{layer}.alpha"] = torch.tensor(float(rank))
    return rest
