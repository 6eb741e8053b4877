"""The two linear maps a layer can be, apart from its weight: products, and their gradients in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class LinearMap:
    """``x (..., in) -> x @ weight.T (..., out)``."""

    channel_dim = -1

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def input_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return grad @ weight

    def weight_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])


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

    def ungrouped(self, x: Tensor, weight: Tensor) -> Tensor:
        """The same sliding window, every channel into every channel."""
        return _CONV[self.dims](x, weight, None, self.stride, self.padding, self.dilation)

    def pointwise(self, x: Tensor, matrix: Tensor, groups: int = 1) -> Tensor:
        """A 1x1 convolution with ``matrix (out, in/groups)``, stride 1."""
        return _CONV[self.dims](x, matrix.reshape(*matrix.shape, *(1,) * self.dims), groups=groups)

    def input_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._backward(grad, x, weight, [True, False, False])[0]

    def weight_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._backward(grad, x, weight, [False, True, False])[1]

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


def conv_map(layer: nn.Module, x: Tensor) -> tuple[ConvMap, Tensor]:
    """The geometry of a convolution layer, and its input padded where zeros on both sides would not do."""
    padding = layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(layer.stride)
    return ConvMap(layer.stride, padding, layer.dilation, layer.groups), x
