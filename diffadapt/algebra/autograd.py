"""Autograd functions of adapted layers, which keep thin tensors for backward, never one as large as a weight.

With its map `L`, weight `W` and bias `b`, a layer whose weight changes by `delta_1`, `delta_2`, ... computes

    y = L(x; W) + b + c_1 L(x_1; delta_1) + c_2 L(x_2; delta_2) + ...

(`branch_sum`), or `scale * y` for a scale of each output channel (`rescaled_product`). A change is applied in
one of two ways:

    chain         L(x; delta) = L_n(... L_1(x; w_1) ...; w_n), through the thin steps of its expression
    weight space  L(x; W + delta), through its matrix

Plain autograd would keep every tensor on the way, and matrices of the size of `W`. The functions here keep
`x`, the factors of the expressions and thin tensors; backward computes all else again. What they keep has no
history, so they have first derivatives only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffadapt.algebra.combined_weight import HALF
from diffadapt.algebra.expression import Expression
from diffadapt.algebra.full_rank import Scaled, Sum
from diffadapt.algebra.layer_maps import (
    ChainStep,
    LayerMap,
    LinearMap,
    cast_steps,
    common_dtype,
    without_autocast,
)


class Term(NamedTuple):
    """A change of a layer as the term `coefficient * L(inputs; change)` of the sum.

    `inputs` is `x` itself, or `x` under the dropout of this change.
    """

    change: Expression
    coefficient: float
    inputs: Tensor


def branch_sum(
    layer: LayerMap, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]
) -> Tensor:
    """`L(x; weight) + bias + sum_i coefficient_i L(inputs_i; change_i)`.

    Args:
        x: `(..., in)`, or `(batch, in, *size)` for a convolution.
        weight: the frozen weight, in the precision of `x`.

    Raises:
        ValueError: the weight is to be trained; it would get no gradient.
    """
    if terms and weight.requires_grad and torch.is_grad_enabled():
        raise _not_frozen(weight)
    if bias is not None:
        bias = bias.to(x.dtype)
    if len(terms) == 1:
        change, coefficient, inputs = terms[0]
        if inputs is x and change.is_thin(layer, weight.shape):
            return chain_product(layer, x, weight, bias, change, coefficient)
    weight_change: Expression | None = None  # the sum of the changes that are added to the weight
    branches: list[tuple[Tensor, float]] = []  # outputs of the other changes, with their coefficients
    for change, coefficient, inputs in terms:
        branch = change.apply(layer, inputs, weight.shape)
        if branch is None and inputs is not x:  # under dropout: the change sees another input than the base
            branch = change_product(layer, inputs, change, weight.shape)
        if branch is not None:
            branches.append((branch, coefficient))
            continue
        scaled_change = change if coefficient == 1 else Scaled(change, coefficient)
        weight_change = scaled_change if weight_change is None else Sum(weight_change, scaled_change)
    if weight_change is None:
        y = layer.apply(x, weight, bias)
    else:
        y = weight_space_product(layer, x, weight, bias, weight_change)
    for branch, coefficient in branches:
        y = torch.add(y, branch, alpha=coefficient)
    return y


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
    """`scale * (L(x; weight) + sum_i coefficient_i L(inputs_i; change_i)) + bias`.

    Args:
        scale: a value for each output channel, of a shape that broadcasts to the output.
        bias: `(out,)`.
        recompute: compute the sum again in backward instead of keeping it, where that can be done.
    """
    inner_bias = None
    offset = None if bias is None else bias.to(x.dtype).reshape(scale.shape)
    if bias is not None and x.dtype in HALF:
        # scale (W x) + b = scale (W x + b) + (1 - scale) b; W x + b is rounded once as in the bare layer
        inner_bias = bias
        offset = (1 - scale) * bias.to(scale.dtype).reshape(scale.shape)
    if recompute and len(terms) == 1:
        change, coefficient, inputs = terms[0]
        if inputs is x and change.is_thin(layer, weight.shape):
            if weight.requires_grad and torch.is_grad_enabled():
                raise _not_frozen(weight)
            if inner_bias is not None:
                inner_bias = inner_bias.to(x.dtype)
            with without_autocast(x.device.type):
                return RescaledProduct.apply(
                    layer, change, coefficient, x, weight, inner_bias, offset, scale, *change.tensors()
                )
    return scaled_channels(branch_sum(layer, x, weight, inner_bias, terms), scale, offset)


def scaled_channels(y: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """`scale * y + offset` in the precision of `y`; `scale` keeps its own.

    Args:
        y: the output of a layer, `(n, ..., out)` or `(n, out, *size)`.
        scale, offset: a value for each channel, of a shape that broadcasts to `y`.
    """
    if y.dtype in HALF:
        return ScaledChannels.apply(y, scale, offset)
    return scale * y if offset is None else torch.addcmul(offset, scale, y)


def chain_product(
    layer: LayerMap, x: Tensor, weight: Tensor, bias: Tensor | None, change: Expression, coefficient: float
) -> Tensor:
    """`L(x; weight) + bias + coefficient L(x; change)` for a thin change."""
    rows = x
    if isinstance(layer, LinearMap) and x.dim() > 2 and x.is_contiguous():
        rows = x.flatten(0, -2)  # (..., in) -> (n, in): one view here, not one in every product
    with without_autocast(x.device.type):
        y = ChainProduct.apply(layer, change, coefficient, rows, weight, bias, *change.tensors())
    return y if rows is x else y.unflatten(0, x.shape[:-1])


def change_product(layer: LayerMap, x: Tensor, change: Expression, shape: torch.Size) -> Tensor:
    """`L(x; change)` alone, for a weight of that shape."""
    y = change.apply(layer, x, shape)
    return weight_space_product(layer, x, None, None, change, shape=shape) if y is None else y


def weight_space_product(
    layer: LayerMap,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    change: Expression,
    *,
    shape: torch.Size | None = None,
) -> Tensor:
    """`L(x; weight + change) + bias`; without a weight, `L(x; change)` for a weight of that `shape`."""
    if weight is not None:
        shape = weight.shape
        weight = weight.detach()  # torch.compile takes no tensor twice, and the change may hold the weight
    with without_autocast(x.device.type):
        return WeightSpaceProduct.apply(layer, change, shape, x, weight, bias, *change.tensors())


class ChainProduct(torch.autograd.Function):
    """`y = L(x; W) + b + L_n(c h_{n-1}; w_n)`, where `h_0 = x` and `h_k = L_k(h_{k-1}; w_k)`.

    Backward, for the gradient `g` by `y`, goes through the steps from the last to the first. Step `k` turns
    `g_k` (`g_n = g`) into the gradient by `w_k`, which needs the step's input, and into `g_{k-1}`, which
    needs `w_k`. The gradient by `x` is that of `L` plus `g_0`.

    Attributes of `ctx`:
        layer, expression, coefficient: the arguments `L`, the change and `c`.
        input_shapes: the shapes of the inputs of all steps.
        inputs_are_thin: whether the inputs of steps behind the first are at most half as large as `x` or `y`,
            so that they are kept; if not, backward computes them again from `x`.
        bare_steps: the steps without their weights, if the weights are kept; None if backward computes them
            again from the factors.
        factor_count: how many factors are kept: all, or none where backward does not need them.

    Saved tensors, in this order: `W`; the factors; the inputs of the steps (None where neither a gradient nor
    another input needs it); the weights of the steps.
    """

    @staticmethod
    def forward(ctx, *inputs):  # torch.compile takes named arguments for the context where their number fits
        layer, expression, coefficient, x, weight, bias, *factors = inputs
        expression = expression.with_tensors(factors)
        steps = cast_steps(expression.steps(layer, weight.shape), x.dtype)
        step_inputs = _step_inputs(steps, x, coefficient)
        y = layer.apply(x, weight, bias)
        steps[-1].map.add_product(y, step_inputs[-1], steps[-1].weight)

        larger = max(x.numel(), y.numel())
        inputs_are_thin = True
        for step_input in step_inputs[1:]:
            inputs_are_thin = inputs_are_thin and 2 * step_input.numel() <= larger
        kept_inputs = []
        for step, step_input in zip(steps, step_inputs, strict=True):
            is_kept = step.trained if inputs_are_thin else step_input is x
            kept_inputs.append(step_input if is_kept else None)

        # weights that were not cast are views of the factors, or small: keeping them costs nothing
        keeps_weights = expression.saves_step_weights and x.dtype == common_dtype(factors)
        bare_steps = []
        kept_weights = []
        if keeps_weights:
            for step in steps:
                bare_steps.append(ChainStep(step.map, None, step.trained))
                kept_weights.append(step.weight)
        kept_factors = factors if expression.backward_needs_factors or not keeps_weights else []

        ctx.layer = layer
        ctx.expression = expression
        ctx.coefficient = coefficient
        ctx.input_shapes = []
        for step_input in step_inputs:
            ctx.input_shapes.append(step_input.shape)
        ctx.inputs_are_thin = inputs_are_thin
        ctx.bare_steps = bare_steps if keeps_weights else None
        ctx.factor_count = len(kept_factors)
        ctx.save_for_backward(weight, *kept_factors, *kept_inputs, *kept_weights)
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
            weight, *saved = ctx.saved_tensors
            inputs_end = ctx.factor_count + len(ctx.input_shapes)
            factors = saved[: ctx.factor_count]
            step_inputs = list(saved[ctx.factor_count : inputs_end])  # torch 2.9 compiles a slice to a tuple
            step_weights = saved[inputs_end:]

            expression = ctx.expression.with_tensors(factors) if factors else ctx.expression
            if ctx.bare_steps is None:
                steps = cast_steps(expression.steps(ctx.layer, weight.shape), grad.dtype)
            else:
                steps = []
                for step, step_weight in zip(ctx.bare_steps, step_weights, strict=True):
                    steps.append(ChainStep(step.map, step_weight, step.trained))
            if not ctx.inputs_are_thin:
                step_inputs = _step_inputs(steps, step_inputs[0], ctx.coefficient)
            for number, shape in enumerate(ctx.input_shapes):
                if step_inputs[number] is None:  # only its shape is needed: a tensor without memory
                    step_inputs[number] = grad.new_empty(1).expand(shape)

            grad_x = ctx.layer.input_grad(grad, step_inputs[0], weight) if needs_x else None
            grad_x, step_grads = _chain_backward(steps, step_inputs, grad, grad_x, ctx.coefficient)
            factor_grads = _factor_grads(expression, step_grads)
            grad_bias = ctx.layer.bias_grad(grad) if needs_bias else None
        return None, None, None, grad_x, None, grad_bias, *factor_grads


class RescaledProduct(torch.autograd.Function):
    """`scale * y + offset` by channels, with the `y` of `ChainProduct`.

    Keeps `x` and the factors alone. Backward computes `y` and the inputs of the steps again:
    `d scale = sum_n y g`, `d offset = sum_n g`, and the gradient by `y` is `scale * g`.
    """

    @staticmethod
    def forward(ctx, *inputs):  # as in ChainProduct
        layer, expression, coefficient, x, weight, bias, offset, scale, *factors = inputs
        steps = cast_steps(expression.with_tensors(factors).steps(layer, weight.shape), x.dtype)
        step_inputs = _step_inputs(steps, x, coefficient)
        y = layer.apply(x, weight, bias)
        steps[-1].map.add_product(y, step_inputs[-1], steps[-1].weight)
        ctx.layer = layer
        ctx.expression = expression
        ctx.coefficient = coefficient
        ctx.offset_shape_and_dtype = None if offset is None else (offset.shape, offset.dtype)
        ctx.save_for_backward(x, weight, bias, scale, *factors)
        return y.mul_(scale) if offset is None else torch.addcmul(offset, y, scale, out=y)

    @staticmethod
    def backward(ctx, grad):
        _, _, _, needs_x, _, needs_bias, needs_offset, *_ = ctx.needs_input_grad
        grad_x = grad_bias = grad_offset = None
        with without_autocast(grad.device.type):
            x, weight, bias, scale, *factors = ctx.saved_tensors
            expression = ctx.expression.with_tensors(factors)
            steps = cast_steps(expression.steps(ctx.layer, weight.shape), grad.dtype)
            step_inputs = _step_inputs(steps, x, ctx.coefficient)
            y = ctx.layer.apply(x, weight, bias)
            steps[-1].map.add_product(y, step_inputs[-1], steps[-1].weight)

            grad_scale = y.mul_(grad).sum_to_size(scale.shape).to(scale.dtype)
            if needs_offset:
                shape, dtype = ctx.offset_shape_and_dtype
                grad_offset = grad.sum_to_size(shape).to(dtype)
            grad = torch.mul(grad, scale, out=torch.empty_like(grad))  # by y
            if needs_bias:
                grad_bias = ctx.layer.bias_grad(grad)
            if needs_x:
                grad_x = ctx.layer.input_grad(grad, x, weight)
            grad_x, step_grads = _chain_backward(steps, step_inputs, grad, grad_x, ctx.coefficient)
            factor_grads = _factor_grads(expression, step_grads)
        return None, None, None, grad_x, None, grad_bias, grad_offset, grad_scale, *factor_grads


def _step_inputs(steps: Sequence[ChainStep], x: Tensor, coefficient: float) -> list[Tensor]:
    """The input of every step: `x`, `h_1`, ..., `c h_{n-1}`; the last is thin, so `c` costs least there."""
    step_inputs = [x]
    for step in steps[:-1]:
        step_inputs.append(step.map.apply(step_inputs[-1], step.weight))
    if coefficient != 1:
        step_inputs[-1] = coefficient * step_inputs[-1]
    return step_inputs


def _chain_backward(
    steps: Sequence[ChainStep],
    step_inputs: Sequence[Tensor],
    grad: Tensor,
    grad_x: Tensor | None,
    coefficient: float,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The backward of a chain, from its last step to its first.

    Args:
        grad: the gradient by the output of the last step.
        grad_x: the gradient by `x` so far, to which the chain's is added in place; None if it is not needed.

    Returns:
        The gradient by `x`, and those by the weights of all steps.
    """
    step_grads: list[Tensor | None] = []
    for number in reversed(range(len(steps))):
        step = steps[number]
        if number == 0:
            needs = (grad_x is not None, step.trained)
            into = grad_x
        else:
            needs = (True, step.trained)
            into = None
        grad, weight_grad = step.map.backward(grad, step_inputs[number], step.weight, needs, into)
        step_grads.insert(0, weight_grad)
        if number == len(steps) - 1 and coefficient != 1:  # the last step's input was c h_{n-1}
            grad = coefficient * grad
    return grad, step_grads


def _factor_grads(expression: Expression, step_grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients by the factors, in their precision, given those by the weights of the steps."""
    dtype = common_dtype(expression.tensors())
    return expression.steps_backward([None if grad is None else grad.to(dtype) for grad in step_grads])


class WeightSpaceProduct(torch.autograd.Function):
    """`y = L(x; W + delta) + b`; without a weight, `y = L(x; delta)`.

    Keeps `x` and the factors, and builds the sum again in backward. With `G`, the gradient by `W + delta`
    (the map's own weight gradient), the factors get `expression.vjp(G)`.

    Where activations are in half precision and factors are not, the change is a product of its own,
    `L(x; W) + L(x; delta)`, because `W + delta` would round it away.
    """

    @staticmethod
    def forward(ctx, *inputs):  # as in ChainProduct
        layer, expression, shape, x, weight, bias, *factors = inputs
        expression = expression.with_tensors(factors)
        ctx.layer = layer
        ctx.expression = expression
        ctx.shape = shape
        ctx.save_for_backward(x, weight, *factors)
        if weight is not None and x.dtype == common_dtype(factors):
            changed_weight = expression.added_to(weight.flatten(1)).reshape(shape)
            return layer.apply(x, changed_weight, bias)
        y = layer.apply(x, expression.matrix().reshape(shape).to(x.dtype))
        return y if weight is None else layer.apply(x, weight, bias) + y

    @staticmethod
    def backward(ctx, grad):
        x, weight, *factors = ctx.saved_tensors
        layer = ctx.layer
        expression = ctx.expression.with_tensors(factors)
        factor_dtype = common_dtype(factors)
        grad_x = None
        if ctx.needs_input_grad[3]:
            if weight is not None and x.dtype == factor_dtype:
                changed_weight = expression.added_to(weight.flatten(1)).reshape(ctx.shape)
                grad_x = layer.input_grad(grad, x, changed_weight)
            else:
                grad_x = layer.input_grad(grad, x, expression.matrix().reshape(ctx.shape).to(x.dtype))
                if weight is not None:
                    grad_x = layer.input_grad(grad, x, weight) + grad_x
        grad_bias = layer.bias_grad(grad) if ctx.needs_input_grad[5] else None
        weight_shape_only = x.new_empty(1).expand(ctx.shape)  # a weight without memory
        grad_weight = layer.weight_grad(grad, x, weight_shape_only).flatten(1)  # G (out, fan_in)
        return None, None, None, grad_x, None, grad_bias, *expression.vjp(grad_weight.to(factor_dtype))


class ScaledChannels(torch.autograd.Function):
    """`scale * y + offset` for `y` in half precision, rounded once, after the sum.

    The scale stays in its own precision: rounded to bfloat16's 8 bits, 1.003 would be 1, and 1.005 would be
    1.0078.
    """

    @staticmethod
    def forward(ctx, y, scale, offset):
        ctx.save_for_backward(y, scale)
        ctx.offset_shape_and_dtype = None if offset is None else (offset.shape, offset.dtype)
        scaled = torch.empty_like(y)
        if offset is None:
            return torch.mul(y, scale, out=scaled)
        return torch.addcmul(offset, y, scale, out=scaled)

    @staticmethod
    def backward(ctx, grad):
        # dy = scale * g, d scale = sum_n y g, d offset = sum_n g
        y, scale = ctx.saved_tensors
        grad_y = grad_scale = grad_offset = None
        if ctx.needs_input_grad[0]:
            grad_y = torch.mul(grad, scale, out=torch.empty_like(grad))
        if ctx.needs_input_grad[1]:
            grad_scale = (grad * y).sum_to_size(scale.shape).to(scale.dtype)
        if ctx.needs_input_grad[2]:
            shape, dtype = ctx.offset_shape_and_dtype
            grad_offset = grad.sum_to_size(shape).to(dtype)
        return grad_y, grad_scale, grad_offset


def _not_frozen(weight: Tensor) -> ValueError:
    return ValueError(
        f"the weight {tuple(weight.shape)} of an adapted layer requires a gradient, but would get none; "
        "call requires_grad_(False) on the model, and train whole weights with the method full"
    )
