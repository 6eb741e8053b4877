"""The most memory that a computation needs at a time, counted from shapes: the meta device will do."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is active, as long as they live.

    Memory that a kernel uses inside is not seen. Attention is counted as a fused kernel computes it, without
    the matrix of all pairs of tokens; use `peak_memory`.

    Args:
        excluded: tensors that are not counted, such as weights.

    Attributes:
        now: bytes that are alive.
        peak: the largest value of `now`.
    """

    def __init__(self, excluded: Iterable[Tensor] = ()):
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known = WeakIdKeyDictionary()  # storages
        for tensor in excluded:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor):
                self._count(output.untyped_storage())
        return outputs

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


@contextmanager
def peak_memory(excluded: Iterable[Tensor] = ()) -> Iterator[PeakMemory]:
    """Counts what is computed within the context, with attention as a fused kernel."""
    attention = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _fused_attention
    try:
        with PeakMemory(excluded) as memory:
            yield memory
    finally:
        F.scaled_dot_product_attention = attention


class _FusedAttention(torch.autograd.Function):
    """The shapes of fused attention: it keeps its inputs, its output and a logarithm per query and head."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])  # (B, heads, N, D)
        normalisers = query.new_empty(query.shape[:-1], dtype=torch.float32)  # (B, heads, N)
        ctx.save_for_backward(query, key, value, output, normalisers)
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, *options: object, **named: object) -> Tensor:
    return _FusedAttention.apply(query, key, value)
