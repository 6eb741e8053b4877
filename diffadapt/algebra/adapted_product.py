"""The sum of a layer's own product and its branches, without keeping any weight-sized tensor for backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffadapt.algebra.chain_autograd import ChainProduct, RescaledProduct
from diffadapt.algebra.combined_weight import HALF
from diffadapt.algebra.layer_maps import LinearMap, widest, without_autocast
from diffadapt.algebra.update import Expression, LayerMap, Scaled, Sum

Term = tuple[Expression, float, Tensor]  # a change, its coefficient, and the input it sees


class WeightSpaceProduct(torch.autograd.Function):
    """``layer(x)`` with the weight ``W + delta``: keeps ``x`` and the factors, rebuilds the sum in backward.

    Without a weight, ``delta`` alone. In half precision the change is applied as a product of its own, since
    ``W + delta`` would round it away.
    """

    @staticmethod
    def forward(ctx, *inputs):  # as in ChainProduct
        layer, form, shape, x, weight, bias, *factors = inputs
        form = form.with_tensors(factors)
        ctx.layer, ctx.form, ctx.shape = layer, form, shape
        ctx.save_for_backward(x, weight, *factors)
        if x.dtype == widest(factors) and weight is not None:
            return layer.product(x, form.added_to(weight.flatten(1)).reshape(shape), bias)
        y = layer.product(x, form.matrix().reshape(shape).to(x.dtype))
        return y if weight is None else layer.product(x, weight, bias) + y

    @staticmethod
    def backward(ctx, grad):
        x, weight, *factors = ctx.saved_tensors
        layer, form, wide = ctx.layer, ctx.form.with_tensors(factors), widest(factors)
        grad_x = None
        if ctx.needs_input_grad[3] and x.dtype == wide and weight is not None:
            grad_x = layer.input_grad(grad, x, form.added_to(weight.flatten(1)).reshape(ctx.shape))
        elif ctx.needs_input_grad[3]:
            grad_x = layer.input_grad(grad, x, form.matrix().reshape(ctx.shape).to(x.dtype))
            grad_x = grad_x if weight is None else layer.input_grad(grad, x, weight) + grad_x
        grad_bias = layer.bias_grad(grad) if ctx.needs_input_grad[5] else None
        grad_weight = layer.weight_grad(grad, x, x.new_empty(1).expand(ctx.shape)).flatten(1)
        return None, None, None, grad_x, None, grad_bias, *form.vjp(grad_weight.to(wide))


def rescaled_product(
    layer: LayerMap,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    terms: Sequence[Term],
    *,
    recompute: bool,
) -> Tensor:
    """``scale`` times ``branch_sum``, plus ``bias (out,)``.

    Args:
        recompute: make the product again in backward instead of keeping it, where that can be done.
        scale: a value a channel, of a shape that broadcasts to the output.
    """
    inner, offset = None, None if bias is None else bias.to(x.dtype).reshape(scale.shape)
    if bias is not None and x.dtype in HALF:
        # scale (W x) + b = scale (W x + b) + (1 - scale) b; W x + b is rounded once as in the bare layer
        inner = bias
        offset = (1 - scale) * bias.to(scale.dtype).reshape(scale.shape)
    if recompute and len(terms) == 1 and terms[0][2] is x and terms[0][0].is_thin(layer, weight.shape):
        _check_frozen(weight)
        change, coefficient, _ = terms[0]
        inner = None if inner is None else inner.to(x.dtype)
        with without_autocast(x.device.type):
            return RescaledProduct.apply(
                layer, change, coefficient, x, weight, inner, offset, scale, *change.tensors()
            )
    return scaled_channels(branch_sum(layer, x, weight, inner, terms), scale, offset)


def scaled_channels(y: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """``scale * y``, plus ``offset``, in the precision of ``y``; ``scale`` keeps its own.

    Args:
        y: a layer's output ``(n, ..., out)`` or ``(n, out, *size)``.
        scale, offset: a value a channel, of a shape that broadcasts to ``y``.
    """
    if y.dtype in HALF:
        return ScaledChannels.apply(y, scale, offset)
    return scale * y if offset is None else torch.addcmul(offset, scale, y)


class ScaledChannels(torch.autograd.Function):
    """``scale * y + offset`` for ``y`` in half precision, rounded once, after the sum.

    The scale stays wide: rounded to bfloat16's 8 bits, 1.003 would be 1, and 1.005 would be 1.0078.
    """

    @staticmethod
    def forward(ctx, y, scale, offset):
        ctx.save_for_backward(y, scale)
        ctx.of_offset = None if offset is None else (offset.shape, offset.dtype)
        scaled = torch.empty_like(y)
        if offset is None:
            return torch.mul(y, scale, out=scaled)
        return torch.addcmul(offset, y, scale, out=scaled)

    @staticmethod
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        grad_y = grad_scale = grad_offset = None
        if ctx.needs_input_grad[0]:
            grad_y = torch.mul(grad, scale, out=torch.empty_like(grad))
        if ctx.needs_input_grad[1]:
            grad_scale = (grad * y).sum_to_size(scale.shape).to(scale.dtype)
        if ctx.needs_input_grad[2]:
            shape, dtype = ctx.of_offset
            grad_offset = grad.sum_to_size(shape).to(dtype)
        return grad_y, grad_scale, grad_offset


def branch_sum(
    layer: LayerMap, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]
) -> Tensor:
    """``layer(x)`` with ``weight`` and ``bias``, plus every term's ``coefficient * layer(inputs)``.

    Raises: ValueError for a weight that is to be trained: it would get no gradient.
    """
    if terms:
        _check_frozen(weight)
    dense: Expression | None = None
    branches: list[tuple[Tensor, float]] = []
    bias = None if bias is None else bias.to(x.dtype)
    if len(terms) == 1 and terms[0][2] is x and terms[0][0].is_thin(layer, weight.shape):
        return chain_product(layer, x, weight, bias, *terms[0][:2])
    for expression, coefficient, inputs in terms:
        branch = expression.product(layer, inputs, weight.shape)
        if branch is not None:
            branches.append((branch, coefficient))
        elif inputs is x:
            scaled = expression if coefficient == 1 else Scaled(expression, coefficient)
            dense = scaled if dense is None else Sum(dense, scaled)
        else:  # dropout: the branch sees another input than the base
            branch = weight_space_product(layer, inputs, None, None, expression, shape=weight.shape)
            branches.append((branch, coefficient))
    y = (
        layer.product(x, weight, bias)
        if dense is None
        else weight_space_product(layer, x, weight, bias, dense)
    )
    for branch, coefficient in branches:
        y = torch.add(y, branch, alpha=coefficient)
    return y


def weight_space_product(
    layer: LayerMap,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    change: Expression,
    *,
    shape: torch.Size | None = None,
) -> Tensor:
    """``layer(x)`` with ``weight`` plus a change; without a weight, the change alone in that ``shape``."""
    if weight is not None:
        shape, weight = weight.shape, weight.detach()  # the change may hold it: compiling takes none twice
    with without_autocast(x.device.type):
        return WeightSpaceProduct.apply(layer, change, shape, x, weight, bias, *change.tensors())


def chain_product(
    layer: LayerMap, x: Tensor, weight: Tensor, bias: Tensor | None, change: Expression, coefficient: float
) -> Tensor:
    """``layer(x)`` with ``weight`` and ``bias``, plus ``coefficient`` times a thin change."""
    if isinstance(layer, LinearMap) and x.dim() > 2 and x.is_contiguous():  # one view, not one per product
        rows = chain_product(layer, x.flatten(0, -2), weight, bias, change, coefficient)
        return rows.unflatten(0, x.shape[:-1])
    with without_autocast(x.device.type):
        return ChainProduct.apply(layer, change, coefficient, x, weight, bias, *change.tensors())


def _check_frozen(weight: Tensor) -> None:
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"the weight {tuple(weight.shape)} of an adapted layer requires a gradient, but would get none; "
            "call requires_grad_(False) on the model, and train whole weights with the method full"
        )
