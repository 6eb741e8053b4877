"""Safetensors files: reading, checking and hashing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Reads a whole file.

    Returns:
        The metadata of its header, and the tensors by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118 (not a dict)
                tensors[key] = file.get_tensor(key)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error
    return metadata, tensors


def read_header(path: Path) -> dict[str, str]:
    """Reads the metadata of a file's header only; empty if it is not a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, RuntimeError):
        return {}


def check_finite(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Checks that all tensors of a file are of floating-point type and finite.

    Raises:
        ValueError: one is not; the message names it and the file.
    """
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOAT_DTYPES:
            dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
            raise ValueError(f"{path}: {key} is of type {tensor.dtype}; adapters are {dtypes}")
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {key} holds values that are not finite numbers")


def checksums(tensors: Mapping[str, Tensor], configuration: str) -> dict[str, str]:
    """The hashes that a header stores of its file's content, so that damage is noticed.

    Args:
        tensors: all tensors of the file.
        configuration: the JSON of the adapter, as the header stores it.
    """
    return {
        "sha256": hash_tensors(tensors),
        # a damaged header may hold half a surrogate pair, which plain UTF-8 refuses to encode
        "adapter_sha256": hashlib.sha256(configuration.encode("utf-8", "surrogatepass")).hexdigest(),
    }


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, in the order of their names."""
    hasher = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        hasher.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy())  # numpy has no bfloat16, but its bytes
    return hasher.hexdigest()
