"""Linear maps of layers and of the steps of a chain: their products, and the gradients in closed form."""

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

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
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

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
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


LayerMap = LinearMap | ConvMap


@dataclass(frozen=True)
class ChannelGroups:
    """The same map on every one of ``count`` equal runs of channels."""

    inner: LayerMap | ChannelGroups | GroupMix
    count: int

    @property
    def channel_dim(self) -> int:
        return self.inner.channel_dim

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._join(self.inner.apply(self._split(x), weight))

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, wanted: Wanted, into: Tensor | None = None
    ) -> Grads:
        grad_x, grad_weight = self.inner.backward(self._split(grad), self._split(x), weight, wanted)
        return added(None if grad_x is None else self._join(grad_x), into), grad_weight

    def _split(self, x: Tensor) -> Tensor:
        if self.channel_dim == -1:
            return x.unflatten(-1, (self.count, x.shape[-1] // self.count))
        return x.reshape(x.shape[0] * self.count, x.shape[1] // self.count, *x.shape[2:])

    def _join(self, x: Tensor) -> Tensor:
        if self.channel_dim == -1:
            return x.flatten(-2)
        return x.reshape(x.shape[0] // self.count, self.count * x.shape[1], *x.shape[2:])


@dataclass(frozen=True)
class GroupMix:
    """``weight (a, b)`` between runs of channels: ``b`` equal runs become ``a``."""

    channel_dim: int

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[self.channel_dim] = shape[self.channel_dim] // weight.shape[1] * weight.shape[0]
        return (weight @ self._runs(x, weight.shape[1])).reshape(shape)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, wanted: Wanted, into: Tensor | None = None
    ) -> Grads:
        grad_x = grad_weight = None
        if wanted[1]:
            runs = self._runs(grad, weight.shape[0]), self._runs(x, weight.shape[1])
            grad_weight = torch.tensordot(*runs, ([0, 2], [0, 2]))
        if wanted[0]:
            grad_x = self.apply(grad, weight.T)
        return added(grad_x, into), grad_weight

    def _runs(self, x: Tensor, count: int) -> Tensor:
        """``(n, count, length of a run)``."""
        rows = x.shape[0] if self.channel_dim == 1 else x.numel() // max(x.shape[-1], 1)
        return x.reshape(rows, count, x.numel() // max(rows * count, 1))


@dataclass(frozen=True)
class ChannelSum:
    """``share`` times the sum over the channels of each of ``groups`` runs, added in float32 or wider."""

    channel_dim: int
    groups: int = 1
    share: float = 1.0

    def apply(self, x: Tensor, weight: None = None) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        if self.groups == 1:
            total = x.sum(self.channel_dim, keepdim=True, dtype=wide)
        else:
            total = x.unflatten(1, (self.groups, -1)).sum(2, dtype=wide)
        return (total if self.share == 1 else total * self.share).to(x.dtype)

    def backward(
        self, grad: Tensor, x: Tensor, weight: None, wanted: Wanted, into: Tensor | None = None
    ) -> Grads:
        if not wanted[0]:
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

    def to(self, dtype: torch.dtype) -> ChainStep:
        if self.weight is None or self.weight.dtype == dtype:
            return self
        return ChainStep(self.map, self.weight.to(dtype), self.trained)
