"""Randomness as a function: every draw depends on its key alone, never on what was drawn before it.

A key is a tuple such as ("noise", seed, epoch, sample). Resuming needs only a position, and any number of
workers or processes sees the same values. Draws are made on the CPU, so they agree on every device.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

Key = tuple[str | int, ...]


def seed_from(key: Key) -> int:
    """A 63-bit seed from a key (a hash, so that neighbouring keys share nothing)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(key: Key) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed_from(key))


def normal(key: Key, shape: Sequence[int]) -> Tensor:
    """Standard normal values, float32."""
    return torch.randn(tuple(shape), generator=generator(key))


def integer(key: Key, limit: int) -> int:
    """A whole number in [0, limit)."""
    return int(torch.randint(limit, (1,), generator=generator(key)))


def uniform(key: Key, count: int) -> list[float]:
    """`count` values in [0, 1)."""
    return torch.rand(count, generator=generator(key), dtype=torch.float64).tolist()


@lru_cache(maxsize=64)
def permutation(key: Key, length: int) -> Tensor:
    """The numbers below `length` in random order, int64; recent ones are kept."""
    return torch.randperm(length, generator=generator(key))
