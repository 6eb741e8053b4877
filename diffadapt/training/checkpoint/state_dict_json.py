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
        TypeError: a value would need pickling.
    """
    if isinstance(value, torch.Tensor):
        # a copy, since safetensors refuses tensors that share memory
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        # Pairs, because keys of JSON objects are texts and an optimizer's are numbers.
        pairs = []
        for key, item in value.items():
            pairs.append([key, pack(item, f"{name}.{key}", tensors)])
        return {"dict": pairs}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        items = []
        for index, item in enumerate(value):
            items.append(pack(item, f"{name}.{index}", tensors))
        return {kind: items}
    # not isinstance: a subclass, as of an enumeration, would come back as the plain type
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which cannot be stored without pickling it")


def unpack(packed: Packed, tensors: Mapping[str, torch.Tensor]) -> object:
    """The value that was packed.

    Raises:
        KeyError: a tensor is missing.
        ValueError: the JSON is of another form.
    """
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()  # ValueError for any other number of keys than one
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        items = [unpack(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    raise ValueError(f"unknown kind of value {kind!r}")
