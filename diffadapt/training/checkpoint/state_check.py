"""Checks of a saved state before any of it is used: whether it is intact, and fits the run that resumes."""

import hashlib
import json
import math
from collections.abc import Mapping

import torch

from diffadapt.common.safetensors_file import FLOAT_DTYPES, hash_tensors


def state_digest(content: Mapping[str, object], tensors: Mapping[str, torch.Tensor]) -> str:
    """A SHA-256 over the JSON of a state and its tensors."""
    text = json.dumps(content) + hash_tensors(tensors)
    return hashlib.sha256(text.encode()).hexdigest()


def check_state(saved: object, current: Mapping[str, object]) -> None:
    """Compares a saved state with the current one of the run that is to continue from it.

    What an optimizer keeps for a parameter may differ, beyond being tensors and finite numbers; its groups
    may hold anything besides the parameters' numbers (Prodigy adds values and knows infinity).

    Raises:
        ValueError: a value differs in type, name or shape; the message names the first one.
    """
    if not isinstance(saved, dict) or not isinstance(saved.get("optimizer"), dict):
        raise ValueError("it holds no state of an optimizer")
    current_groups = current["optimizer"]["param_groups"]
    parameter_count = sum(len(group["params"]) for group in current_groups)
    optimizer_state = saved["optimizer"].get("state")
    _check_optimizer_state(optimizer_state, parameter_count)
    _check_groups(saved["optimizer"].get("param_groups"), current_groups)

    # The optimizer was checked above, since a new one has no state to compare with yet; everything else must
    # be like the current state.
    saved_optimizer = {**saved["optimizer"], "param_groups": []}
    current_optimizer = {**current["optimizer"], "state": optimizer_state, "param_groups": []}
    check_like({**saved, "optimizer": saved_optimizer}, {**current, "optimizer": current_optimizer}, "state")
    if saved["step"] < 0 or saved["skipped"] < 0:
        raise ValueError(f"the step is {saved['step']} and {saved['skipped']} were skipped")


def _check_optimizer_state(state: object, parameter_count: int) -> None:
    """Checks parameter number -> name -> tensor or finite number."""
    if not isinstance(state, dict):
        raise ValueError("the optimizer's state is not by the number of parameters")
    for number, values in state.items():
        # type() and not isinstance(): True is an int, and equal to the parameter number 1
        if type(number) is not int or not 0 <= number < parameter_count:
            raise ValueError("the optimizer's state is not by the number of parameters")
        if not isinstance(values, dict):
            raise ValueError("the optimizer's state of a parameter is not by name")
        _check_parameter_state(values, "optimizer")


def _check_parameter_state(values: dict[object, object], name: str) -> None:
    """Checks name -> tensor, finite number or, as bitsandbytes has it, such names again."""
    if not all(isinstance(key, str) for key in values):
        raise ValueError(f"the state of a parameter in {name} is not by name")
    for key, value in values.items():
        if isinstance(value, dict):
            _check_parameter_state(value, f"{name}.{key}")
            continue
        if not isinstance(value, torch.Tensor | int | float | None):
            raise ValueError(f"{name}.{key} is {value!r:.100}, neither a tensor nor a number")
        check_like(value, value, f"{name}.{key}")  # with itself: finite numbers only


def _check_groups(saved: object, current: list[dict[str, object]]) -> None:
    """Checks that the groups hold the same parameters, by number."""
    saved_numbers = None
    if isinstance(saved, list):
        saved_numbers = []
        for group in saved:
            saved_numbers.append(group.get("params") if isinstance(group, dict) else None)
    if saved_numbers != [group["params"] for group in current]:
        raise ValueError("the optimizer's groups are of other parameters")


def check_like(saved: object, current: object, name: str) -> None:
    """Checks that both values have the same types, names and shapes, and `saved` finite numbers.

    Raises:
        ValueError: they are not alike; the message has the value and where it stands.
    """
    if not _is_like(saved, current):
        raise ValueError(f"{name} is {saved!r:.100} where this run has {current!r:.100}")
    if isinstance(current, dict):
        for key, value in current.items():
            check_like(saved[key], value, f"{name}.{key}")
    elif isinstance(current, list | tuple):
        for index, value in enumerate(current):
            check_like(saved[index], value, f"{name}.{index}")


def _is_like(saved: object, current: object) -> bool:
    """`check_like` without what dictionaries and lists contain."""
    # A learning rate of 1 is the same as one of 1.0.
    are_numbers = type(saved) in (int, float) and type(current) in (int, float)
    if type(saved) is not type(current) and not are_numbers:
        return False
    if isinstance(current, torch.Tensor):
        return _is_like_tensor(saved, current)
    if isinstance(current, dict):
        return saved.keys() == current.keys()
    if isinstance(current, list | tuple):
        return len(saved) == len(current)
    if isinstance(current, float):
        return math.isfinite(saved)
    return True


def _is_like_tensor(saved: torch.Tensor, current: torch.Tensor) -> bool:
    if saved.shape != current.shape or saved.dtype != current.dtype:
        return False
    if not saved.is_floating_point() and not saved.is_complex():
        return True
    return saved.dtype in FLOAT_DTYPES and bool(saved.isfinite().all())
