"""Random starting values: drawn in float64 on the CPU, so that every machine draws the same."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def draw_normal(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill with N(0, std^2)."""
    tensor.copy_(std * torch.randn(tensor.shape, dtype=torch.float64, device="cpu", generator=generator))


def draw_uniform(tensor: Tensor, bound: float, generator: torch.Generator) -> None:
    """Fill with U(-bound, bound)."""
    tensor.copy_(
        bound * (2 * torch.rand(tensor.shape, dtype=torch.float64, device="cpu", generator=generator) - 1)
    )


def draw_orthonormal(tensor: Tensor, generator: torch.Generator) -> None:
    """Fill a matrix with a random orthonormal frame: columns, or rows where it is wider than tall."""
    rows, columns = tensor.shape
    gaussian = torch.randn(
        max(rows, columns), min(rows, columns), dtype=torch.float64, device="cpu", generator=generator
    )
    frame = torch.linalg.qr(gaussian).Q
    tensor.copy_(frame if rows >= columns else frame.T)


def named_generator(seed: int, *words: str) -> torch.Generator:
    """A CPU generator seeded by a number and names: the same on every machine, in any order of sites."""
    digest = hashlib.sha256("/".join([str(seed), *words]).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))
