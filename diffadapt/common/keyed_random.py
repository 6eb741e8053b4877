"""Random numbers as a function of a key: no value depends on what was drawn before it.

A key is a tuple such as ("noise", seed, epoch, sample). So a resumed run needs its position only, and any
number of workers or processes draws the same values. They are drawn on the CPU, which makes them the same for
every device.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

Key = tuple[str | int, ...]


def seed_from(key: Key) -> int:
    """A seed of 63 bits from a key; it is a hash, so that seeds of similar keys are unrelated."""
    # `repr` keeps ("a", 1) and ("a1",) apart, and is the same in every process, unlike Python's own `hash`
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # manual_seed takes signed integers of 64 bits


def generator(key: Key) -> torch.Generator:
    """A generator on the CPU, seeded by a key."""
    return torch.Generator("cpu").manual_seed(seed_from(key))


def normal(key: Key, shape: Sequence[int]) -> Tensor:
    """Standard normal values, float32."""
    return torch.randn(tuple(shape), generator=generator(key))


def integer(key: Key, limit: int) -> int:
    """An integer in [0, limit)."""
    return int(torch.randint(limit, (1,), generator=generator(key)))


def uniform(key: Key, count: int) -> list[float]:
    """`count` values in [0, 1)."""
    return torch.rand(count, generator=generator(key), dtype=torch.float64).tolist()


@lru_cache(maxsize=64)
def permutation(key: Key, length: int) -> Tensor:
    """The integers below `length` in random order, int64. The latest results are cached."""
    return torch.randperm(length, generator=generator(key))
