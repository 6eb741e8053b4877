"""Whether a saved state is whole and fits the run that asks for it, before any of it is used."""

import hashlib
import json
import math
from collections.abc import Mapping

import torch

from diffadapt.common.safetensors_file import FLOAT_DTYPES, hash_tensors


def state_digest(content: Mapping[str, object], tensors: Mapping[str, torch.Tensor]) -> str:
    """A SHA-256 over the JSON of a state and its tensors."""
    return hashlib.sha256((json.dumps(content) + hash_tensors(tensors)).encode()).hexdigest()


def check_state(saved: object, own: Mapping[str, object]) -> None:
    """Raises ValueError naming the first value that the run's `own` state has with another kind or shape.

    What an optimizer keeps for a parameter is its own business, beyond being tensors and finite numbers; its
    groups may hold anything besides the parameters' numbers (Prodigy adds values and knows infinity).
    """
    if not isinstance(saved, dict) or not isinstance(saved.get("optimizer"), dict):
        raise ValueError("it holds no state of an optimizer")
    kept = saved["optimizer"].get("state")
    count = sum(len(group["params"]) for group in own["optimizer"]["param_groups"])
    if not isinstance(kept, dict) or not all(type(key) is int and 0 <= key < count for key in kept):
        raise ValueError("the optimizer's state is not by the number of parameters")
    for values in kept.values():
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise ValueError("the optimizer's state of a parameter is not by name")
        for key, value in values.items():
            if not isinstance(value, torch.Tensor | int | float | None):
                raise ValueError(f"optimizer.{key} is {value!r:.100}, neither a tensor nor a number")
            check_like(value, value, f"optimizer.{key}")
    groups, numbers = saved["optimizer"].get("param_groups"), own["optimizer"]["param_groups"]
    if not isinstance(groups, list) or [_numbers(group) for group in groups] != list(map(_numbers, numbers)):
        raise ValueError("the optimizer's groups are of other parameters")
    own = {**own, "optimizer": {**own["optimizer"], "state": kept, "param_groups": []}}
    saved = {**saved, "optimizer": {**saved["optimizer"], "param_groups": []}}
    check_like(saved, own, "state")
    if saved["step"] < 0 or saved["skipped"] < 0:
        raise ValueError(f"the step is {saved['step']} and {saved['skipped']} were skipped")


def _numbers(group: object) -> object:
    return group.get("params") if isinstance(group, dict) else None


def check_like(saved: object, own: object, name: str) -> None:
    """Raises ValueError unless both have the same kinds, names and shapes, and `saved` finite numbers."""
    same = type(saved) is type(own) or (type(saved) in (int, float) and type(own) in (int, float))
    if isinstance(own, torch.Tensor):
        same = same and (saved.shape, saved.dtype) == (own.shape, own.dtype)
        whole = not saved.is_floating_point() and not saved.is_complex() if same else False
        same = same and (whole or (saved.dtype in FLOAT_DTYPES and bool(saved.isfinite().all())))
    elif isinstance(own, dict):
        same = same and saved.keys() == own.keys()
    elif isinstance(own, list | tuple):
        same = same and len(saved) == len(own)
    elif isinstance(own, float):
        same = same and math.isfinite(saved)
    if not same:
        raise ValueError(f"{name} is {saved!r:.100} where this run has {own!r:.100}")
    for key, inner in own.items() if isinstance(own, dict) else ():
        check_like(saved[key], inner, f"{name}.{key}")
    for index, inner in enumerate(own) if isinstance(own, list | tuple) else ():
        check_like(saved[index], inner, f"{name}.{index}")
