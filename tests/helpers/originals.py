"""The same factors into ours and another implementation: outputs, gradients and merges compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from helpers.method_cases import Model, close
from torch import Tensor, nn

import diffadapt as da

Theirs = tuple[Tensor, Callable[[Tensor], Tensor]]  # their tensor, and how to read it as ours


def same(value: Tensor) -> Tensor:
    return value


def flat(value: Tensor) -> Tensor:
    """A convolution's factor as a matrix."""
    return value.flatten(1)


def layer(kind: str) -> tuple[nn.Module, Tensor]:
    """A float64 layer with random weights, and an input."""
    torch.manual_seed(0)
    made = {
        "linear": lambda: nn.Linear(12, 10),
        "conv": lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1),
        "conv-1x1": lambda: nn.Conv2d(8, 6, 1),
        "conv-grouped": lambda: nn.Conv2d(8, 12, 3, padding=1, groups=2),
    }[kind]()
    shape = (3, 5, 12) if kind == "linear" else (2, 8, 6, 5)
    return made.double(), torch.randn(shape, dtype=torch.float64)


def randomized(parameters: Mapping[str, Tensor] | list[Tensor]) -> None:
    """Values away from any start."""
    values = parameters.values() if isinstance(parameters, Mapping) else parameters
    for parameter in values:
        parameter.data.copy_(0.5 * torch.randn_like(parameter))


def assert_same(
    base: nn.Module,
    method: da.methods.Method,
    x: Tensor,
    original: Callable[[Tensor], Tensor],
    theirs: Mapping[str, Theirs],
    *,
    frozen: Mapping[str, Tensor] | None = None,
    tolerance: float = 1e-10,
) -> None:
    """Our output, gradients and merged output equal the original's.

    Args:
        base: the bare layer; it is copied.
        original: their forward, of which ``theirs`` holds the trained tensors by our names.
        frozen: values of our frozen tensors, stored or constant, by name.
    """
    model = Model(copy.deepcopy(base))
    adapter = da.attach(model, method, "layer")
    part, ours = adapter.parts[0], dict(adapter.parts[0].tensors[0].items())
    trained = {key for key, tensor in ours.items() if tensor.requires_grad}
    assert trained == set(theirs), f"our trained tensors are {sorted(trained)}"
    for key, (tensor, read) in theirs.items():
        ours[key].data.copy_(read(tensor.detach()))
    for key, value in (frozen or {}).items():
        (ours[key] if key in ours else getattr(part.constants, key)).data.copy_(value)
    x_ours, x_theirs = (x.clone().requires_grad_() for _ in range(2))
    y_ours, y_theirs = model(x_ours), original(x_theirs)
    close(y_ours, y_theirs, tolerance)
    pull = torch.randn(y_ours.shape, dtype=y_ours.dtype, generator=torch.Generator().manual_seed(1))
    (y_ours * pull).sum().backward()
    (y_theirs * pull).sum().backward()
    close(x_ours.grad, x_theirs.grad, tolerance)
    for key, (tensor, read) in theirs.items():
        close(ours[key].grad, read(tensor.grad), tolerance)
    da.merge(adapter)
    close(model(x), y_theirs, tolerance)
