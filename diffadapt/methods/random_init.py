"""Random starting values: generated in float64 on the CPU, so that they are the same on every machine."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def draw_normal(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """Fills a tensor with N(0, std^2)."""
    normal = torch.randn(tensor.shape, dtype=torch.float64, device="cpu", generator=generator)
    tensor.copy_(std * normal)


def draw_uniform(tensor: Tensor, bound: float, generator: torch.Generator) -> None:
    """Fills a tensor with U(-bound, bound)."""
    uniform = torch.rand(tensor.shape, dtype=torch.float64, device="cpu", generator=generator)  # in [0, 1)
    tensor.copy_(bound * (2 * uniform - 1))


def draw_orthonormal(tensor: Tensor, generator: torch.Generator) -> None:
    """Fills a matrix with a random orthonormal frame: its columns, or its rows where these are fewer."""
    rows, columns = tensor.shape
    tall_shape = (max(rows, columns), min(rows, columns))
    gaussian = torch.randn(tall_shape, dtype=torch.float64, device="cpu", generator=generator)
    frame = torch.linalg.qr(gaussian).Q  # tall_shape, with orthonormal columns
    tensor.copy_(frame if rows >= columns else frame.T)


def named_generator(seed: int, *words: str) -> torch.Generator:
    """A CPU generator seeded by a number and names, whatever the order in which generators are made."""
    digest = hashlib.sha256("/".join([str(seed), *words]).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))
