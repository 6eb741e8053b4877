"""Safetensors files: read whole, and the hash of what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors. Raises FileNotFoundError, or ValueError for a file that cannot be read."""
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error


def read_header(path: Path) -> dict[str, str]:
    """The header alone; empty where the file is no safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, RuntimeError):
        return {}


def check_finite(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises ValueError naming the first tensor that holds anything but finite floating-point numbers."""
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOAT_DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
            raise ValueError(f"{path}: {key} is of type {tensor.dtype}; adapters are {known}")
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {key} holds values that are not finite numbers")


def checksums(tensors: Mapping[str, Tensor], configuration: str) -> dict[str, str]:
    """What a file's header says of the rest of the file, so that no damage goes unseen."""
    return {
        "sha256": hash_tensors(tensors),
        "adapter_sha256": hashlib.sha256(configuration.encode("utf-8", "surrogatepass")).hexdigest(),
    }


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, in the order of their names."""
    hasher = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        hasher.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return hasher.hexdigest()
