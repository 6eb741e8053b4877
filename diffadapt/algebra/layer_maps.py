"""Linear maps of layers and of the steps of a chain: their products, and the gradients in closed form.

A map `L(x; w)` is linear in its input `x` and in its weight `w`. With `g`, the gradient of the loss by
`y = L(x; w)`, each map has two gradients: by its input (`g` through the transposed map) and by its weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
NeedsGrad = tuple[bool, bool]  # whether the gradients by the input and by the weight are needed
Grads = tuple[Tensor | None, Tensor | None]  # those gradients; None where not needed


@dataclass(frozen=True)
class LinearMap:
    """`y = x w^T` on the last axis: `x (..., in)`, `w (out, in)`, `y (..., out)`."""

    channel_dim = -1
    groups = 1

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def add_product(self, y: Tensor, x: Tensor, weight: Tensor) -> None:
        """Adds the product to `y` in place."""
        as_rows(y).addmm_(as_rows(x), weight.T)

    def input_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return grad @ weight  # dx = g w

    def weight_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return as_rows(grad).T @ as_rows(x)  # dw = sum_n g_n x_n^T

    def bias_grad(self, grad: Tensor) -> Tensor:
        return as_rows(grad).sum(0)  # (out,)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: NeedsGrad, into: Tensor | None = None
    ) -> Grads:
        """The needed gradients by the input and by the weight.

        Args:
            into: a tensor to which the gradient by the input is added in place; it is then returned for it.
        """
        needs_input, needs_weight = needs
        grad_weight = self.weight_grad(grad, x, weight) if needs_weight else None
        if not needs_input:
            return None, grad_weight
        if into is None:
            return self.input_grad(grad, x, weight), grad_weight
        as_rows(into).addmm_(as_rows(grad), weight)
        return into, grad_weight


@dataclass(frozen=True)
class ConvMap:
    """A convolution, `y = w * x`, by its geometry.

    Shapes: `x (batch, in, *size)`, which must already carry the padding of non-zero modes;
    `w (out, in / groups, *kernel)`; `y (batch, out, *size')`.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    channel_dim = 1

    @property
    def dims(self) -> int:
        return len(self.stride)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        conv = _CONV[self.dims]
        return conv(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def add_product(self, y: Tensor, x: Tensor, weight: Tensor) -> None:
        """Adds the product to `y` in place."""
        y.add_(self.apply(x, weight))

    def ungrouped(self) -> ConvMap:
        """The same sliding window, every channel into every channel."""
        return self if self.groups == 1 else replace(self, groups=1)

    def pointwise(self, groups: int = 1) -> ConvMap:
        """A 1x1 convolution of as many dimensions, stride 1."""
        ones = (1,) * self.dims
        zeros = (0,) * self.dims
        return ConvMap(ones, zeros, ones, groups)

    def input_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._backward(grad, x, weight, [True, False, False])[0]

    def weight_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._backward(grad, x, weight, [False, True, False])[1]

    def bias_grad(self, grad: Tensor) -> Tensor:
        return grad.sum([0, *range(2, grad.dim())])  # over batch and positions: (out,)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: NeedsGrad, into: Tensor | None = None
    ) -> Grads:
        """As `LinearMap.backward`."""
        grad_x, grad_weight, _ = self._backward(grad, x, weight, [*needs, False])
        return _add_into(grad_x, into), grad_weight

    def _backward(self, grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor, ...]:
        """The gradients by input, weight and bias for which `mask` is set.

        The operator reads only the shape of `x` without the second, and of `weight` without the first.
        """
        return torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            None,  # bias sizes
            self.stride,
            self.padding,
            self.dilation,
            False,  # not transposed
            [0] * self.dims,  # output padding
            self.groups,
            mask,
        )


LayerMap = LinearMap | ConvMap


@dataclass(frozen=True)
class ChannelGroups:
    """The same map on every one of `count` equal runs of channels.

    The runs move into an axis before the channels (linear) or into the batch (convolution) and back.
    """

    inner: LayerMap | ChannelGroups | GroupMix
    count: int

    @property
    def channel_dim(self) -> int:
        return self.inner.channel_dim

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._join(self.inner.apply(self._split(x), weight))

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: NeedsGrad, into: Tensor | None = None
    ) -> Grads:
        # every run sees the same weight: the sum over them is the inner map's sum over its batch
        grad_x, grad_weight = self.inner.backward(self._split(grad), self._split(x), weight, needs)
        if grad_x is not None:
            grad_x = self._join(grad_x)
        return _add_into(grad_x, into), grad_weight

    def _split(self, x: Tensor) -> Tensor:
        if self.channel_dim == -1:
            return x.unflatten(-1, (self.count, x.shape[-1] // self.count))  # (..., count, in)
        return x.reshape(x.shape[0] * self.count, x.shape[1] // self.count, *x.shape[2:])

    def _join(self, x: Tensor) -> Tensor:
        if self.channel_dim == -1:
            return x.flatten(-2)
        return x.reshape(x.shape[0] // self.count, self.count * x.shape[1], *x.shape[2:])


@dataclass(frozen=True)
class GroupMix:
    """Mixes runs of channels: with `w (a, b)`, `b` equal runs become `a`, `y_i = sum_j w[i, j] x_j`."""

    channel_dim: int

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[self.channel_dim] = shape[self.channel_dim] // weight.shape[1] * weight.shape[0]
        return (weight @ self._runs(x, weight.shape[1])).reshape(shape)

    def add_product(self, y: Tensor, x: Tensor, weight: Tensor) -> None:
        """Adds the product to `y` in place."""
        y.add_(self.apply(x, weight))

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: NeedsGrad, into: Tensor | None = None
    ) -> Grads:
        needs_input, needs_weight = needs
        grad_x = None
        grad_weight = None
        if needs_weight:  # dw[i, j] = sum_nl g[n, i, l] x[n, j, l]
            grad_runs = self._runs(grad, weight.shape[0])
            x_runs = self._runs(x, weight.shape[1])
            grad_weight = torch.tensordot(grad_runs, x_runs, ([0, 2], [0, 2]))
        if needs_input:  # dx_j = sum_i w[i, j] g_i
            grad_x = self.apply(grad, weight.T)
        return _add_into(grad_x, into), grad_weight

    def _runs(self, x: Tensor, count: int) -> Tensor:
        """`x` as `(rows, count, length of a run)`; of a convolution a run includes all positions."""
        rows = x.shape[0] if self.channel_dim == 1 else x.numel() // max(x.shape[-1], 1)
        return x.reshape(rows, count, x.numel() // max(rows * count, 1))


@dataclass(frozen=True)
class ChannelSum:
    """`share` times the sum over the channels of each of `groups` runs, added in float32 or wider."""

    channel_dim: int
    groups: int = 1
    share: float = 1.0

    def apply(self, x: Tensor, weight: None = None) -> Tensor:
        sum_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if self.groups == 1:
            total = x.sum(self.channel_dim, keepdim=True, dtype=sum_dtype)
        else:
            total = x.unflatten(1, (self.groups, -1)).sum(2, dtype=sum_dtype)
        return (total if self.share == 1 else total * self.share).to(x.dtype)

    def backward(
        self, grad: Tensor, x: Tensor, weight: None, needs: NeedsGrad, into: Tensor | None = None
    ) -> Grads:
        # every channel of a run gets the gradient of the run's sum
        needs_input, _ = needs
        if not needs_input:
            return None, None
        if self.share != 1:
            grad = grad * self.share
        if self.groups > 1:
            grad = grad.repeat_interleave(x.shape[1] // self.groups, 1)
        return (grad.expand(x.shape) if into is None else into.add_(grad)), None


@dataclass(frozen=True)
class ChainStep:
    """One map of a chain with its weight; the weight of an untrained step is a constant."""

    map: LayerMap | ChannelGroups | GroupMix | ChannelSum
    weight: Tensor | None = None
    trained: bool = True


def conv_map(layer: nn.Module, x: Tensor) -> tuple[ConvMap, Tensor]:
    """The geometry of a convolution layer, and its input, padded unless equal zeros on both sides will do."""
    padding = layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(layer.stride)
    return ConvMap(layer.stride, padding, layer.dilation, layer.groups), x


def cast_steps(steps: Sequence[ChainStep], dtype: torch.dtype) -> list[ChainStep]:
    """The steps of a chain with their weights in the precision of activations."""
    cast = []
    for step in steps:
        needs_cast = step.weight is not None and step.weight.dtype != dtype
        cast.append(ChainStep(step.map, step.weight.to(dtype), step.trained) if needs_cast else step)
    return cast


def as_rows(x: Tensor) -> Tensor:
    """`x (..., n)` as a matrix of rows; itself where it is one."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The lowest precision that holds the values of all tensors."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def without_autocast(device: str) -> contextlib.AbstractContextManager:
    """A context in which operators keep the precision of their tensors; an empty one if autocast is off."""
    enabled = device != "meta" and torch.is_autocast_enabled(device)  # torch knows none on the meta device
    return torch.autocast(device, enabled=False) if enabled else contextlib.nullcontext()


def _add_into(value: Tensor | None, into: Tensor | None) -> Tensor | None:
    """Adds `value` in place to `into` where there is one; returns the sum."""
    return value if value is None or into is None else into.add_(value)
