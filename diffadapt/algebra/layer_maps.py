"""The two linear maps a layer can be, apart from its weight: products, and their gradients in closed form."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
Wanted = tuple[bool, bool]  # the gradients asked for: of the input, of the weight
Grads = tuple[Tensor | None, Tensor | None]  # those gradients; None where not asked for


@dataclass(frozen=True)
class LinearMap:
    """``x (..., in) -> x @ weight.T (..., out)``."""

    channel_dim = -1
    groups = 1

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def input_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return grad @ weight

    def weight_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return as_rows(grad).T @ as_rows(x)

    def bias_grad(self, grad: Tensor) -> Tensor:
        return as_rows(grad).sum(0)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, wanted: Wanted, into: Tensor | None = None
    ) -> Grads:
        """The wanted gradients of the input and the weight; the input's is added in place to ``into``."""
        grad_weight = self.weight_grad(grad, x, weight) if wanted[1] else None
        if not wanted[0] or into is None:
            return (self.input_grad(grad, x, weight) if wanted[0] else None), grad_weight
        as_rows(into).addmm_(as_rows(grad), weight)
        return into, grad_weight


@dataclass(frozen=True)
class ConvMap:
    """A convolution's geometry. ``x (batch, in, *size)`` must already carry the padding of non-zero modes."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    channel_dim = 1

    @property
    def dims(self) -> int:
        return len(self.stride)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        conv = _CONV[self.dims]
        return conv(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def whole(self) -> ConvMap:
        """The same sliding window, every channel into every channel."""
        return self if self.groups == 1 else replace(self, groups=1)

    def pointwise(self, groups: int = 1) -> ConvMap:
        """A 1x1 convolution of as many dimensions, stride 1."""
        ones, zeros = (1,) * self.dims, (0,) * self.dims
        return ConvMap(ones, zeros, ones, groups)

    def input_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._backward(grad, x, weight, [True, False, False])[0]

    def weight_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._backward(grad, x, weight, [False, True, False])[1]

    def bias_grad(self, grad: Tensor) -> Tensor:
        return grad.sum([0, *range(2, grad.dim())])

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, wanted: Wanted, into: Tensor | None = None
    ) -> Grads:
        """The wanted gradients of the input and the weight; the input's is added in place to ``into``."""
        grad_x, grad_weight, _ = self._backward(grad, x, weight, [*wanted, False])
        return added(grad_x, into), grad_weight

    def _backward(self, grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor, ...]:
        return torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * self.dims,
            self.groups,
            mask,
        )


def as_rows(x: Tensor) -> Tensor:
    """``x (..., n)`` as a matrix of rows; itself where it is one."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """The precision that holds the values of all."""
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else functools.reduce(torch.promote_types, dtypes)


def without_autocast(device: str) -> contextlib.AbstractContextManager:
    """Operators keep the precision of their tensors within; nothing at all where autocast is off."""
    enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else contextlib.nullcontext()


def added(value: Tensor | None, into: Tensor | None) -> Tensor | None:
    """``value``, added in place to ``into`` where there is one."""
    return value if value is None or into is None else into.add_(value)


def conv_map(layer: nn.Module, x: Tensor) -> tuple[ConvMap, Tensor]:
    """The geometry of a convolution layer, and its input padded where zeros on both sides would not do."""
    padding = layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(layer.stride)
    return ConvMap(layer.stride, padding, layer.dilation, layer.groups), x
