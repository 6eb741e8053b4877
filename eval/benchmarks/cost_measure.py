"""What a training step costs: time and memory, and what does not depend on the machine."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from diffadapt.training.memory import kept_storages

Loss = Callable[[nn.Module], Tensor]  # runs a model on fixed inputs


@dataclass(frozen=True)
class Counts:
    """Costs that follow from the operators alone.

    Attributes:
        kept_bytes: tensors kept between forward and backward, each storage once, without the base's own.
        flops: floating-point operations of products and convolutions, forward and backward.
        operators: operators dispatched, forward and backward.
        launches: those of them that compute: neither views nor allocations. What a GPU would launch.
    """

    kept_bytes: int
    flops: int
    operators: int
    launches: int


_ATEN = torch.ops.aten
_FREE = {
    _ATEN._unsafe_view,
    _ATEN.detach,
    _ATEN.empty,
    _ATEN.new_empty,
    _ATEN.empty_like,
    _ATEN.empty_strided,
}


def _addmm_flops(total: torch.Size, first: torch.Size, second: torch.Size, **_) -> int:
    return 2 * first[0] * first[1] * second[1]


_IN_PLACE = {_ATEN.addmm_: _addmm_flops}  # which the counter does not know


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = self.launches = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "aten":
            self.operators += 1
            self.launches += not operator.is_view and operator.overloadpacket not in _FREE
        return operator(*args, **(kwargs or {}))


def count_step(model: nn.Module, base: nn.Module, loss: Loss) -> Counts:
    """Run one training step of ``model``, whose frozen weights are those of ``base``, and count."""
    own = [*base.parameters(), *base.buffers()]
    with FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as flops, _Operators() as operators:
        with kept_storages(own) as kept:
            value = loss(model)
        total = sum(storage.nbytes() for storage in kept.values())
        kept.clear()
        value.backward()
    model.zero_grad(set_to_none=True)
    return Counts(total, flops.get_total_flops(), operators.operators, operators.launches)


@dataclass(frozen=True)
class Timing:
    """One training step and one forward without gradients.

    Attributes:
        step_seconds: forward and backward.
        eval_seconds: forward in eval mode.
        rise_bytes: how far the process' resident memory rose above its start during the step.
    """

    step_seconds: float
    eval_seconds: float
    rise_bytes: int


def time_step(model: nn.Module, loss: Loss) -> Timing:
    """Run one training step and one eval-mode forward."""
    model.train()
    before = _reset_peak()
    start = time.perf_counter()
    loss(model).backward()
    step = time.perf_counter() - start
    rise = _memory("VmHWM") - before
    model.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        start = time.perf_counter()
        loss(model)
        forward = time.perf_counter() - start
    model.train()
    return Timing(step, forward, rise)


def _reset_peak() -> int:
    """Give freed memory back to the system, forget the peak, and return the resident bytes (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _memory("VmRSS")


def _memory(field: str) -> int:
    line = next(
        line
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) * 1024
