"""Autograd functions of adapted layers: the layer's own product and the products of its changes, added up.

The sum is made in place. Wide tensors between the steps of a chain, and factors that are themselves products
of trained tensors, are made again in backward, and no weight-sized tensor is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffadapt.algebra.combined_weight import HALF
from diffadapt.algebra.expression import Expression
from diffadapt.algebra.full_rank import Scaled, Sum
from diffadapt.algebra.layer_maps import (
    ChainStep,
    LayerMap,
    LinearMap,
    as_rows,
    common_dtype,
    without_autocast,
)

Term = tuple[Expression, float, Tensor]  # a change, its coefficient, and the input it sees


class ChainProduct(torch.autograd.Function):
    """``layer(x)`` with ``weight`` and ``bias``, plus ``coefficient`` times the chain of a change.

    What it keeps has no history, so it has first derivatives alone.
    """

    @staticmethod
    def forward(ctx, *inputs):  # torch.compile takes named arguments for the context where their number fits
        layer, form, coefficient, x, weight, bias, *factors = inputs
        steps = _steps(form.with_tensors(factors), layer, weight, x.dtype)
        y, seen = _sum(layer, steps, coefficient, x, weight, bias)
        ctx.layer, ctx.form, ctx.coefficient = layer, form, coefficient
        ctx.shapes = [tensor.shape for tensor in seen]
        ctx.thin = all(2 * tensor.numel() <= max(x.numel(), y.numel()) for tensor in seen[1:])
        needed = [step.trained and ctx.thin for step in steps]
        needed[0] = steps[0].trained or not ctx.thin
        kept = [tensor if keep else None for tensor, keep in zip(seen, needed, strict=True)]
        own = form.saves_step_weights and x.dtype == common_dtype(factors)
        ctx.bare = [ChainStep(step.map, None, step.trained) for step in steps] if own else None
        ctx.count = 0 if own and not form.backward_needs_factors else len(factors)
        ctx.save_for_backward(weight, *factors[: ctx.count], *kept, *[step.weight for step in steps if own])
        return y

    @staticmethod
    def backward(ctx, grad):
        _, _, _, needs_x, _, needs_bias, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "an adapted layer has no second derivatives, so create_graph=True would give wrong ones; "
                "differentiate once, or merge the adapter first"
            )
        with without_autocast(grad.device.type):
            weight, *rest = ctx.saved_tensors
            count, length = ctx.count, len(ctx.shapes)
            form = ctx.form.with_tensors(rest[:count]) if count else ctx.form
            inputs = rest[count : count + length]
            if ctx.bare is None:
                steps = _steps(form, ctx.layer, weight, grad.dtype)
            else:
                weights = rest[count + length :]
                steps = [ChainStep(s.map, own, s.trained) for s, own in zip(ctx.bare, weights, strict=True)]
            if not ctx.thin:
                inputs = _inputs(steps, inputs[0], ctx.coefficient)
            inputs = [_like(grad, shape, x) for shape, x in zip(ctx.shapes, inputs, strict=True)]
            grad_x = ctx.layer.input_grad(grad, inputs[0], weight) if needs_x else None
            grad_x, grads = _chain_backward(steps, inputs, grad, grad_x, ctx.coefficient)
            own = _own(form, grads)
            grad_bias = ctx.layer.bias_grad(grad) if needs_bias else None
        return None, None, None, grad_x, None, grad_bias, *own


class RescaledProduct(torch.autograd.Function):
    """``scale`` times (``layer(x)`` with ``bias`` plus the chain of a change), plus ``offset``, by channels.

    Keeps ``x`` alone and makes the product again in backward, where ``scale`` needs it.
    """

    @staticmethod
    def forward(ctx, *inputs):  # as in ChainProduct
        layer, form, coefficient, x, weight, bias, offset, scale, *factors = inputs
        steps = _steps(form.with_tensors(factors), layer, weight, x.dtype)
        y, _ = _sum(layer, steps, coefficient, x, weight, bias)
        ctx.layer, ctx.form, ctx.coefficient = layer, form, coefficient
        ctx.of_offset = None if offset is None else (offset.shape, offset.dtype)
        ctx.save_for_backward(x, weight, bias, scale, *factors)
        return y.mul_(scale) if offset is None else torch.addcmul(offset, y, scale, out=y)

    @staticmethod
    def backward(ctx, grad):
        _, _, _, needs_x, _, needs_bias, needs_offset, *_ = ctx.needs_input_grad
        grad_x = grad_bias = grad_offset = None
        with without_autocast(grad.device.type):
            x, weight, bias, scale, *factors = ctx.saved_tensors
            form = ctx.form.with_tensors(factors)
            steps = _steps(form, ctx.layer, weight, grad.dtype)
            y, inputs = _sum(ctx.layer, steps, ctx.coefficient, x, weight, bias)
            grad_scale = y.mul_(grad).sum_to_size(scale.shape).to(scale.dtype)
            if needs_offset:
                shape, dtype = ctx.of_offset
                grad_offset = grad.sum_to_size(shape).to(dtype)
            grad = torch.mul(grad, scale, out=torch.empty_like(grad))
            if needs_bias:
                grad_bias = ctx.layer.bias_grad(grad)
            if needs_x:
                grad_x = ctx.layer.input_grad(grad, x, weight)
            grad_x, grads = _chain_backward(steps, inputs, grad, grad_x, ctx.coefficient)
        return None, None, None, grad_x, None, grad_bias, grad_offset, grad_scale, *_own(form, grads)


def _sum(
    layer: LayerMap,
    steps: Sequence[ChainStep],
    coefficient: float,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """The layer's product with the chain's added in place, and what every step saw."""
    inputs, last = _inputs(steps, x, coefficient), steps[-1]
    y = layer.apply(x, weight, bias)
    if isinstance(last.map, LinearMap):
        as_rows(y).addmm_(as_rows(inputs[-1]), last.weight.T)
    else:
        y.add_(last.map.apply(inputs[-1], last.weight))
    return y, inputs


def _own(form: Expression, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of a change's tensors, in their precision, given those of its steps' weights."""
    wide = common_dtype(form.tensors())
    return form.steps_backward([value if value is None else value.to(wide) for value in grads])


def _steps(form: Expression, layer: LayerMap, weight: Tensor, dtype: torch.dtype) -> list[ChainStep]:
    return [step.to(dtype) for step in form.steps(layer, weight.shape)]


def _inputs(steps: Sequence[ChainStep], x: Tensor, coefficient: float) -> list[Tensor]:
    """What every step sees; the last one sees its input times the coefficient, as it is thin there."""
    inputs = [x]
    for step in steps[:-1]:
        inputs.append(step.map.apply(inputs[-1], step.weight))
    if coefficient != 1:
        inputs[-1] = coefficient * inputs[-1]
    return inputs


def _chain_backward(
    steps: Sequence[ChainStep],
    inputs: Sequence[Tensor],
    grad: Tensor,
    grad_x: Tensor | None,
    coefficient: float,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """``grad_x`` (None: not wanted) with the chain's share added, and the gradients of the steps' weights."""
    grads: list[Tensor | None] = []
    for number in reversed(range(len(steps))):
        step, into = steps[number], grad_x if number == 0 else None
        wanted = (number > 0 or grad_x is not None, step.trained)
        grad, own = step.map.backward(grad, inputs[number], step.weight, wanted, into)
        grads.insert(0, own)
        if number == len(steps) - 1 and coefficient != 1:
            grad = coefficient * grad
    return grad, grads


def _like(grad: Tensor, shape: torch.Size, x: Tensor | None) -> Tensor:
    """``x``, or in the place of one that was not kept a tensor of its shape and no memory."""
    return grad.new_empty(1).expand(shape) if x is None else x


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
        if x.dtype == common_dtype(factors) and weight is not None:
            return layer.apply(x, form.added_to(weight.flatten(1)).reshape(shape), bias)
        y = layer.apply(x, form.matrix().reshape(shape).to(x.dtype))
        return y if weight is None else layer.apply(x, weight, bias) + y

    @staticmethod
    def backward(ctx, grad):
        x, weight, *factors = ctx.saved_tensors
        layer, form, wide = ctx.layer, ctx.form.with_tensors(factors), common_dtype(factors)
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
        branch = expression.apply(layer, inputs, weight.shape)
        if branch is not None:
            branches.append((branch, coefficient))
        elif inputs is x:
            scaled = expression if coefficient == 1 else Scaled(expression, coefficient)
            dense = scaled if dense is None else Sum(dense, scaled)
        else:  # dropout: the branch sees another input than the base
            branch = weight_space_product(layer, inputs, None, None, expression, shape=weight.shape)
            branches.append((branch, coefficient))
    y = layer.apply(x, weight, bias) if dense is None else weight_space_product(layer, x, weight, bias, dense)
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
