"""What can be wrong with a file: mutations of bytes, of text, of JSON values and of tensors."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import torch
from torch import Tensor

HOSTILE = (
    *(None, True, False, 0, 1, -1, 2, 3, 1_000, 10**6, 10**9, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1.0, -2.5, 1e-320, 1e38, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", " ", "0", "4", "lora", "default", "../../../etc/passwd", "/etc/passwd", "C:\\x", "\x00", "\ud800"),
    *("é" * 50, "x" * 20_000, "__class__", "unet.", "conv_in", "{", "[]", "NaN", "!!python/object:os.system"),
    *([], {}, [None], [[[]]], {"": ""}, [0], [-1], [10**9, 10**9], [2, 2], {"rank": 10**9}, ["lora"]),
)
DTYPES = (
    *(torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool),
    *(torch.float8_e4m3fn, torch.complex64),
)


def mutated_value(value: object, rng: random.Random) -> object:
    """A JSON value with one to three of its nodes replaced, removed, repeated, renamed or exchanged."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _once(value, rng)
    return value


def _once(value: object, rng: random.Random) -> object:
    places = list(_places(value))
    if not places or rng.random() < 0.02:
        return _hostile(rng)
    parent, key = rng.choice(places)
    action = rng.randrange(7)
    if action == 1:
        del parent[key]
    elif action == 2 and isinstance(parent, list):
        parent.insert(key, parent[key])
    elif action == 2:
        parent[key + rng.choice(("x", " ", "\u0000", "s"))] = parent.pop(key)
    elif action == 3:
        parent[key] = [parent[key]] if rng.random() < 0.5 else {"value": parent[key]}
    elif action == 4:
        other, place = rng.choice(places)
        if (other, place) != (parent, key) and place in (
            other if isinstance(other, dict) else range(len(other))
        ):
            parent[key] = json.loads(json.dumps(other[place]))
    elif action == 5 and type(parent[key]) in (int, float):
        parent[key] = rng.choice((-1, 2, 10, 1e9, 10**9, 0.5)) * parent[key]
    else:
        parent[key] = _hostile(rng)
    return value


def _hostile(rng: random.Random) -> object:
    return json.loads(json.dumps(rng.choice(HOSTILE)))


def _places(value: object):
    """Every (container, key) within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def mutated_text(text: str, rng: random.Random) -> str:
    """Text with a span removed, repeated or replaced: digits, brackets, nesting, control characters."""
    start = rng.randrange(len(text) + 1)
    end = min(len(text), start + rng.choice((0, 1, 1, 2, 5, 40)))
    span = text[start:end]
    inserts = (
        *("", span * 2, span[::-1], "\x00", "\ufeff", "é", '"', "\\", "[", "}", ",", ":", "-", "9", "e9"),
        *(
            "1" * 5_000,
            "[" * 50_000,
            '{"a":' * 20_000,
            "null",
            "NaN",
            "&a [*a, *a]",
            "? ",
            "!!python/name:os.system ",
        ),
    )
    return text[:start] + rng.choice(inserts) + text[end:]


def mutated_bytes(data: bytes, rng: random.Random, head: int) -> bytes:
    """Bytes with flipped bits, cut, longer, or with spans moved; half of the damage in the first ``head``."""
    place = rng.randrange(head if rng.random() < 0.5 else len(data))
    action = rng.randrange(6)
    if action <= 1:
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 4))):
            changed[min(len(data) - 1, place + rng.randrange(8))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if action == 2:
        return data[:place]
    if action == 3:
        return data[:place] + rng.randbytes(rng.choice((1, 8, 100))) + data[place:]
    if action == 4:
        return data[:place] + data[place + rng.choice((1, 8, 64)) :]
    return data[:place] + data[rng.randrange(len(data)) :]


def mutated_tensors(tensors: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    """Named tensors with one or two retyped, reshaped, cut, grown, exchanged, renamed, or not finite."""
    tensors = dict(tensors)
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(sorted(tensors)) if tensors else ""
        if not key:
            return {"": torch.ones(rng.choice((0, 1)))}
        change = rng.choice(CHANGES)
        if change == "rename":
            tensors[rng.choice(("", key + "x", key[:-1], key.upper(), "é", key.rpartition(".")[0]))] = (
                tensors.pop(key)
            )
        elif change == "remove":
            del tensors[key]
        elif change == "exchange":
            other = rng.choice(sorted(tensors))
            tensors[key], tensors[other] = tensors[other], tensors[key]
        elif change == "dtype":
            tensors[key] = tensors[key].to(rng.choice(DTYPES))
        else:
            tensors[key] = SHAPES[change](tensors[key], rng)
    return {key: tensor.contiguous().clone() for key, tensor in tensors.items()}


def _with_number(tensor: Tensor, rng: random.Random) -> Tensor:
    changed = tensor.clone().float().flatten()
    if changed.numel():
        changed[rng.randrange(changed.numel())] = rng.choice((float("nan"), float("inf"), 1e38, 1e-45, -0.0))
    return changed.reshape(tensor.shape)


SHAPES: dict[str, Callable[[Tensor, random.Random], Tensor]] = {
    "number": _with_number,
    "transposed": lambda tensor, rng: tensor.movedim(0, -1) if tensor.dim() else tensor,
    "flat": lambda tensor, rng: tensor.flatten(),
    "scalar": lambda tensor, rng: torch.tensor(rng.choice((0.0, -1.0, 2.0, 1e30))),
    "empty": lambda tensor, rng: tensor[:0] if tensor.dim() else torch.ones(0),
    "none": lambda tensor, rng: torch.ones(0, rng.choice((0, 3))),
    "cut": lambda tensor, rng: tensor[1:] if tensor.dim() else tensor,
    "grown": lambda tensor, rng: torch.cat([tensor, tensor]) if tensor.dim() else tensor,
    "deeper": lambda tensor, rng: tensor[(None,) * rng.choice((1, 2, 5))],
    "squeezed": lambda tensor, rng: tensor.squeeze(),
}
CHANGES = (*SHAPES, "rename", "remove", "exchange", "dtype", "dtype")
