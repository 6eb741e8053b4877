"""A layer's own product plus a chain of thin ones, with a backward that keeps the input and the thin tensors.

The sum is made in place. Wide tensors between the steps, and factors that are themselves products of trained
tensors, are made again in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffadapt.algebra.chain_steps import Step
from diffadapt.algebra.layer_maps import LinearMap, as_rows, widest, without_autocast

if TYPE_CHECKING:
    from diffadapt.algebra.update import Expression, LayerMap


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
        own = form.keeps_steps and x.dtype == widest(factors)
        ctx.bare = [Step(step.map, None, step.trained) for step in steps] if own else None
        ctx.count = 0 if own and form.steps_suffice else len(factors)
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
                steps = [Step(s.map, own, s.trained) for s, own in zip(ctx.bare, weights, strict=True)]
            if not ctx.thin:
                inputs = _inputs(steps, inputs[0], ctx.coefficient)
            inputs = [_like(grad, shape, x) for shape, x in zip(ctx.shapes, inputs, strict=True)]
            grad_x = ctx.layer.input_grad(grad, inputs[0], weight) if needs_x else None
            grad_x, grads = _back(steps, inputs, grad, grad_x, ctx.coefficient)
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
            grad_x, grads = _back(steps, inputs, grad, grad_x, ctx.coefficient)
        return None, None, None, grad_x, None, grad_bias, grad_offset, grad_scale, *_own(form, grads)


def _sum(
    layer: LayerMap,
    steps: Sequence[Step],
    coefficient: float,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """The layer's product with the chain's added in place, and what every step saw."""
    inputs, last = _inputs(steps, x, coefficient), steps[-1]
    y = layer.product(x, weight, bias)
    if isinstance(last.map, LinearMap):
        as_rows(y).addmm_(as_rows(inputs[-1]), last.weight.T)
    else:
        y.add_(last.map.product(inputs[-1], last.weight))
    return y, inputs


def _own(form: Expression, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of a change's tensors, in their precision, given those of its steps' weights."""
    wide = widest(form.tensors())
    return form.steps_vjp([value if value is None else value.to(wide) for value in grads])


def _steps(form: Expression, layer: LayerMap, weight: Tensor, dtype: torch.dtype) -> list[Step]:
    return [step.to(dtype) for step in form.steps(layer, weight.shape)]


def _inputs(steps: Sequence[Step], x: Tensor, coefficient: float) -> list[Tensor]:
    """What every step sees; the last one sees its input times the coefficient, as it is thin there."""
    inputs = [x]
    for step in steps[:-1]:
        inputs.append(step.map.product(inputs[-1], step.weight))
    if coefficient != 1:
        inputs[-1] = coefficient * inputs[-1]
    return inputs


def _back(
    steps: Sequence[Step], inputs: Sequence[Tensor], grad: Tensor, grad_x: Tensor | None, coefficient: float
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
