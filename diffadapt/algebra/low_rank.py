"""Low-rank expressions: products of thin factors, some of them made from smaller trained tensors.

A chain applies such a change without building its matrix: for `delta = up @ down` a layer computes
`up (down x)`, whose middle has `r` channels. In a convolution `down` becomes `r` kernels of the layer's own
geometry and `up` a 1x1 convolution.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.algebra.expression import ExportForm, Expression
from diffadapt.algebra.layer_maps import ChainStep, ChannelGroups, ChannelSum, ConvMap, LayerMap, LinearMap


@dataclass(frozen=True)
class LowRank(ExportForm):
    """`delta = up @ down`, with `up (out, r)` and `down (r, fan_in)`."""

    up: Tensor
    down: Tensor

    saves_step_weights = True
    backward_needs_factors = False
    depends_on_base = False

    def matrix(self) -> Tensor:
        return self.up @ self.down

    def export_form(self, factor: float = 1.0) -> LowRank:
        return LowRank(factor * self.up, self.down)

    def rows_scaled(self, rows: Tensor) -> LowRank:
        return LowRank(rows[:, None] * self.up, self.down)

    def as_product(self) -> LowRank:
        return self

    def thin_factors(self) -> LowRank:
        return self

    def added_to(self, weight: Tensor) -> Tensor:
        return torch.addmm(weight, self.up, self.down)

    def vjp(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        # d up = G down^T, d down = up^T G
        return grad @ self.down.T, self.up.T @ grad

    def is_thin(self, layer: LayerMap, shape: Sequence[int]) -> bool:
        # with groups every group has all r channels in the middle
        return layer.groups == 1 or layer.groups * self.down.numel() + self.up.numel() < math.prod(shape)

    def steps(self, layer: LayerMap, shape: Sequence[int]) -> Sequence[ChainStep]:
        # y = up (down x); of a grouped convolution y_g = up_g (down x_g) for every group g
        if isinstance(layer, LinearMap):
            return ChainStep(layer, self.down), ChainStep(layer, self.up)
        kernels = self.down.reshape(-1, *shape[1:])  # (r, in/groups, *kernel)
        first = layer if layer.groups == 1 else ChannelGroups(layer.ungrouped(), layer.groups)
        last = layer.pointwise(layer.groups)
        return ChainStep(first, kernels), ChainStep(last, pointwise_weight(self.up, layer))

    def steps_backward(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        down, up = grads
        return up.flatten(1), down.flatten(1)

    def tensors(self) -> tuple[Tensor, ...]:
        # as in the base class, spelled out because every forward of the commonest change calls it
        return self.up, self.down

    def with_tensors(self, tensors: Sequence[Tensor]) -> LowRank:
        return LowRank(*tensors)


@dataclass(frozen=True)
class Tucker(ExportForm):
    """`delta[o, i, k] = sum_ab up[o, a] core[a, b, k] down[b, i]` for the kernel positions `k`.

    Shapes: `up (out, r_out)`, `core (r_out, r_in, *kernel)`, `down (r_in, in/groups)`.
    """

    up: Tensor
    core: Tensor
    down: Tensor

    saves_step_weights = True
    backward_needs_factors = False
    depends_on_base = False

    def matrix(self) -> Tensor:
        return self.up @ self._core_by_down().flatten(1)

    def export_form(self, factor: float = 1.0) -> Tucker:
        return Tucker(factor * self.up, self.core, self.down)

    def rows_scaled(self, rows: Tensor) -> Tucker:
        return Tucker(rows[:, None] * self.up, self.core, self.down)

    def as_product(self) -> LowRank:
        return at_most_full_rank(self.thin_factors(), self)

    def thin_factors(self) -> LowRank:
        return LowRank(self.up, self._core_by_down().flatten(1))

    def vjp(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # with inner = core . down: d up = G inner^T, and d inner = up^T G leads to
        # d core[a, b, k] = sum_i d_inner[a, i, k] down[b, i]
        # d down[b, i] = sum_ak core[a, b, k] d_inner[a, i, k]
        inner = self._core_by_down()  # (r_out, in/groups, *kernel)
        grad_inner = (self.up.T @ grad).reshape(inner.shape)
        grad_core = torch.einsum("ai...,bi->ab...", grad_inner, self.down)
        grad_down = self.core.transpose(0, 1).flatten(1) @ grad_inner.movedim(1, -1).flatten(0, -2)
        return grad @ inner.flatten(1).T, grad_core, grad_down

    def is_thin(self, layer: LayerMap, shape: Sequence[int]) -> bool:
        inner = self.down.numel() + self.core.numel()
        return layer.groups == 1 or layer.groups * inner + self.up.numel() < math.prod(shape)

    def steps(self, layer: LayerMap, shape: Sequence[int]) -> Sequence[ChainStep]:
        # y = up (core * (down x)): the convolution `core` has the layer's geometry, the others are 1x1
        if isinstance(layer, LinearMap):
            raise TypeError("a Tucker product needs a convolution; multiply the core into a low-rank factor")
        first = layer.pointwise()
        middle = layer
        if layer.groups > 1:
            first = ChannelGroups(first, layer.groups)
            middle = ChannelGroups(layer.ungrouped(), layer.groups)
        return (
            ChainStep(first, pointwise_weight(self.down, layer)),
            ChainStep(middle, self.core),
            ChainStep(layer.pointwise(layer.groups), pointwise_weight(self.up, layer)),
        )

    def steps_backward(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        down, core, up = grads
        return up.flatten(1), core, down.flatten(1)

    def _core_by_down(self) -> Tensor:
        """`inner[a, i, k] = sum_b core[a, b, k] down[b, i]`, of shape `(r_out, in/groups, *kernel)`."""
        return torch.einsum("ab...,bi->ai...", self.core, self.down)


@dataclass(frozen=True)
class FeatureSum(Expression):
    """`delta[o, i] = vector[o]`: the sum over an output's receptive field times `vector (out,)`.

    It has rank 1. Its forward keeps the sum alone, never `x`.

    Attributes:
        share: what the steps multiply the sum by and divide the vector by, to keep the sum in range.
    """

    vector: Tensor
    fan_in: int
    share: float = 1.0

    depends_on_base = False

    def matrix(self) -> Tensor:
        return self.vector[:, None].expand(-1, self.fan_in)

    def export_form(self, factor: float = 1.0) -> LowRank:
        return LowRank(factor * self.vector[:, None], self.vector.new_ones(1, self.fan_in))

    def vjp(self, grad: Tensor) -> tuple[Tensor]:
        return (grad.sum(1),)

    def is_thin(self, layer: LayerMap, shape: Sequence[int]) -> bool:
        return True

    def steps(self, layer: LayerMap, shape: Sequence[int]) -> Sequence[ChainStep]:
        # y = (vector / share) (ones * (share sum_i x_i)): channels are summed first, then the kernel's window
        groups = layer.groups
        column = self.vector[:, None]  # (out, 1)
        if self.share != 1:
            column = column / self.share
        total = ChainStep(ChannelSum(layer.channel_dim, groups, self.share), trained=False)
        if isinstance(layer, LinearMap):
            return total, ChainStep(layer, column)
        window = ChainStep(layer, column.new_ones(groups, 1, *shape[2:]), trained=False)
        return total, window, ChainStep(layer.pointwise(groups), pointwise_weight(column, layer))

    def steps_backward(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        grad = grads[-1].reshape(self.vector.shape)
        return (grad if self.share == 1 else grad / self.share,)

    def for_float16(self) -> FeatureSum:
        """Thousands of features would add up to more than 65,504, the largest number of float16."""
        # log2(fan_in) bits would keep every sum in range; half of them, because the vector, which is divided
        # by the same share, has a range too
        bits = math.ceil(math.log2(self.fan_in) / 2)
        return FeatureSum(self.vector, self.fan_in, 2.0**-bits)


class Reparametrized(Expression):
    """Equal to a low-rank expression whose factors are small products of this one's tensors.

    Those products are computed again in backward, so nothing beside the trained tensors is kept.
    """

    depends_on_base = False

    def as_low_rank(self) -> LowRank | Tucker:
        """The equal expression."""
        raise TypeError(f"{type(self).__name__} does not define as_low_rank()")

    def as_low_rank_vjp(self, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """The gradients by `tensors()`, given those by the tensors of `as_low_rank()`."""
        raise TypeError(f"{type(self).__name__} does not define as_low_rank_vjp()")

    def matrix(self) -> Tensor:
        return self.as_low_rank().matrix()

    def export_form(self, factor: float = 1.0) -> LowRank | Tucker:
        return self.as_low_rank().export_form(factor)

    def thin_factors(self) -> LowRank:
        return self.as_low_rank().thin_factors()

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        return self.as_low_rank_vjp(self.as_low_rank().vjp(grad))

    def is_thin(self, layer: LayerMap, shape: Sequence[int]) -> bool:
        return layer.groups == 1 or self.as_low_rank().is_thin(layer, shape)

    def steps(self, layer: LayerMap, shape: Sequence[int]) -> Sequence[ChainStep]:
        return self.as_low_rank().steps(layer, shape)

    def steps_backward(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        # steps run from down to up, the tensors of both low-rank expressions from up to down
        up, *core, down = reversed(grads)
        return self.as_low_rank_vjp((up.flatten(1), *core, down.flatten(1)))


@dataclass(frozen=True)
class LowRankWithCore(Reparametrized):
    """`delta = up @ core @ down`; the core is multiplied into the factor of the shorter side.

    Shapes: `up (out, r_out)`, `core (r_out, r_in)`, `down (r_in, fan_in)`.
    """

    up: Tensor
    core: Tensor
    down: Tensor

    def as_low_rank(self) -> LowRank:
        if self._is_tall():
            return LowRank(self.up, self.core @ self.down)  # (out, r_out), (r_out, fan_in)
        return LowRank(self.up @ self.core, self.down)  # (out, r_in), (r_in, fan_in)

    def as_low_rank_vjp(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        # down' = core down: d core = D' down^T, d down = core^T D'
        # up' = up core:     d up = U' core^T,   d core = up^T U'
        up, down = grads
        if self._is_tall():
            return up, down @ self.down.T, self.core.T @ down
        return up @ self.core.T, self.up.T @ up, down

    def _is_tall(self) -> bool:
        return self.up.shape[0] > self.down.shape[1]


@dataclass(frozen=True)
class TuckerWithKernelFactors(Reparametrized):
    """A Tucker product whose core is itself factored over the axes of the kernel.

    In two dimensions `core'[a, b, h, w] = sum_pq core[a, b, p, q] kernel_0[h, p] kernel_1[w, q]`. Shapes:
    `core (r_out, r_in, *ranks)`, and one factor `kernel_n (size_n, rank_n)` for each dimension of the
    convolution.
    """

    up: Tensor
    core: Tensor
    down: Tensor
    kernel_0: Tensor
    kernel_1: Tensor | None = None
    kernel_2: Tensor | None = None

    saves_step_weights = True  # the full core is small, and making it takes many operators

    def as_low_rank(self) -> Tucker:
        kernel_product = _kernel_product(self._spread_kernels())  # (sizes, ranks)
        core = _channel_rows(self.core) @ kernel_product.T  # (r_out * r_in, sizes)
        sizes = [kernel.shape[0] for kernel in self._kernels()]
        return Tucker(self.up, core.reshape(*self.core.shape[:2], *sizes), self.down)

    def as_low_rank_vjp(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # with C' = C K^T, K the product of the kernel factors: d C = D K, d K = D^T C for D = d C'
        up, core, down = grads
        grad_rows = _channel_rows(core)  # (r_out * r_in, sizes)
        spread = self._spread_kernels()
        grad_core = (grad_rows @ _kernel_product(spread)).reshape(self.core.shape)
        grad_product = torch.mm(grad_rows.T, _channel_rows(self.core))  # (sizes, ranks)
        kernels = self._kernels()
        sizes = [kernel.shape[0] for kernel in kernels]
        ranks = [kernel.shape[1] for kernel in kernels]
        return up, grad_core, down, *_kernels_vjp(grad_product.reshape(*sizes, *ranks), spread)

    def _kernels(self) -> list[Tensor]:
        return [kernel for kernel in (self.kernel_0, self.kernel_1, self.kernel_2) if kernel is not None]

    def _spread_kernels(self) -> list[Tensor]:
        """Every kernel factor with its two axes at their places among `(*sizes, *ranks)`, 1 elsewhere."""
        kernels = self._kernels()
        dims = len(kernels)
        spread = []
        for axis, kernel in enumerate(kernels):
            shape = [1] * (2 * dims)
            shape[axis], shape[dims + axis] = kernel.shape
            spread.append(kernel.reshape(shape))
        return spread


def _channel_rows(core: Tensor) -> Tensor:
    """A core `(r_out, r_in, *axes)` as a matrix with one row for each pair of channels."""
    return core.reshape(core.shape[0] * core.shape[1], -1)


def _kernel_product(spread: Sequence[Tensor]) -> Tensor:
    """`K[(h, w), (p, q)] = kernel_0[h, p] kernel_1[w, q]`, the Kronecker product of the kernel factors."""
    product = functools.reduce(torch.mul, spread)  # (*sizes, *ranks)
    return product.reshape(math.prod(product.shape[: len(spread)]), -1)


def _kernels_vjp(grad: Tensor, spread: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of the kernel factors, given that of their product `(*sizes, *ranks)`.

    For two factors `d kernel_0[h, p] = sum_wq grad[h, w, p, q] kernel_1[w, q]`.
    """
    dims = len(spread)
    grads = []
    for axis in range(dims):
        other_kernels = [kernel for number, kernel in enumerate(spread) if number != axis]
        summed_axes = [dim for dim in range(2 * dims) if dim % dims != axis]
        product = functools.reduce(torch.mul, other_kernels, grad)
        grads.append(product.sum(summed_axes) if summed_axes else product)
    return grads


@dataclass(frozen=True)
class ScaledFactors(Reparametrized):
    """`delta = diag(out_scale) up diag(rank_scale) down`, of which the two scales are trained."""

    up: Tensor
    down: Tensor
    out_scale: Tensor
    rank_scale: Tensor

    def as_low_rank(self) -> LowRank:
        return LowRank(self.out_scale[:, None] * self.up * self.rank_scale, self.down)

    def as_low_rank_vjp(self, grads: tuple[Tensor, ...]) -> tuple[None, None, Tensor, Tensor]:
        # up'[o, r] = out_scale[o] up[o, r] rank_scale[r]
        entries = grads[0] * self.up  # (out, r)
        return None, None, entries @ self.rank_scale, self.out_scale @ entries


@dataclass(frozen=True)
class LowRankDifference(Reparametrized):
    """`delta = up @ down - start_up @ start_down` as one product of rank 2 r.

    Computed as `(up - start_up) @ down + start_up @ (down - start_down)`: the differences are taken before
    any rounding to half precision, and the start is exactly zero.
    """

    up: Tensor
    down: Tensor
    start_up: Tensor
    start_down: Tensor

    def as_low_rank(self) -> LowRank:
        up = torch.cat([self.up - self.start_up, self.start_up], 1)  # (out, 2 r)
        down = torch.cat([self.down, self.down - self.start_down], 0)  # (2 r, fan_in)
        return LowRank(up, down)

    def as_low_rank_vjp(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, None, None]:
        up, down = grads
        rank = self.up.shape[1]
        return up[:, :rank], down[:rank] + down[rank:], None, None


def full_rank_factors(matrix: Tensor) -> LowRank:
    """A matrix as a product with the identity on its shorter side."""
    out, fan_in = matrix.shape
    identity = torch.eye(min(out, fan_in), dtype=matrix.dtype, device=matrix.device)
    return LowRank(identity, matrix) if out <= fan_in else LowRank(matrix, identity)


def at_most_full_rank(product: LowRank, form: ExportForm) -> LowRank:
    """A product that equals a form, or `full_rank_factors` of the form where these have the smaller rank."""
    out, rank = product.up.shape
    fan_in = product.down.shape[1]
    return product if rank <= min(out, fan_in) else full_rank_factors(form.matrix())


def zero_factors(out: int, fan_in: int) -> LowRank:
    """A change of rank 1 that changes nothing, in float64."""
    return LowRank(torch.zeros(out, 1, dtype=torch.float64), torch.zeros(1, fan_in, dtype=torch.float64))


def truncated_svd(matrix: Tensor, rank: int) -> LowRank:
    """The product of a rank that is nearest to a matrix in the Frobenius norm, in float64.

    With `U S V^T` the singular value decomposition, cut to the rank: `up = U sqrt(S)`, `down = sqrt(S) V^T`.

    Source: Eckart and Young 1936.
    """
    u, singular_values, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = singular_values[:rank].sqrt()
    return LowRank(u[:, :rank] * root, root[:, None] * vh[:rank])


def pointwise_weight(matrix: Tensor, layer: ConvMap) -> Tensor:
    """A matrix `(out, in)` as the weight `(out, in, 1, ...)` of a 1x1 convolution."""
    return matrix.reshape(*matrix.shape, *(1,) * layer.dims)
