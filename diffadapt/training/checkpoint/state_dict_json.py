"""Nested state as JSON and tensors: any optimizer's state, exactly and without pickle.

Scalars, text and None stay as they are; dictionaries (with any plain keys), lists and tuples keep their kind;
a tensor becomes a reference to its name among the tensors.
"""

from collections.abc import Mapping

import torch

Packed = object  # what `json` writes


def pack(value: object, name: str, tensors: dict[str, torch.Tensor]) -> Packed:
    """Converts a value to JSON and moves its tensors into a dictionary.

    Args:
        name: beginning of the names of its tensors.
        tensors: name -> tensor, to which those of the value are added.

    Raises:
        TypeError: for a kind of value that would need pickling.
    """
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        # Pairs, because keys of JSON objects are texts and an optimizer's are numbers.
        pairs = [[key, pack(item, f"{name}.{key}", tensors)] for key, item in value.items()]
        return {"dict": pairs}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [pack(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which cannot be stored without pickling it")


def unpack(packed: Packed, tensors: Mapping[str, torch.Tensor]) -> object:
    """The value that was packed.

    Raises:
        KeyError: for a tensor that is missing.
        ValueError: for other JSON.
    """
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        items = [unpack(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    raise ValueError(f"unknown kind of value {kind!r}")
