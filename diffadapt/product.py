"""The sum of a layer's own product and its branches, without keeping any weight-sized tensor for backward."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from diffadapt.chain import ChainProduct
from diffadapt.update import Expression, LayerMap, Scaled, Sum

Term = tuple[Expression, float, Tensor]  # a change, its coefficient, and the input it sees


class WeightSpaceProduct(torch.autograd.Function):
    """``layer(x)`` with the weight ``W + delta``: keeps ``x`` and the factors, rebuilds the sum in backward.

    In half precision the change is applied as a product of its own, since ``W + delta`` would round it away.
    """

    @staticmethod
    def forward(ctx, layer, form, x, weight, bias, *factors):
        change = form.with_tensors(factors).matrix().reshape(weight.shape)
        ctx.layer, ctx.form = layer, form
        ctx.save_for_backward(x, weight, *factors)
        if x.dtype == change.dtype:
            return layer.product(x, weight + change, bias)
        return layer.product(x, weight, bias) + layer.product(x, change.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, weight, *factors = ctx.saved_tensors
        layer, form = ctx.layer, ctx.form.with_tensors(factors)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[2]:
            change = form.matrix().reshape(weight.shape)
            if x.dtype == change.dtype:
                grad_x = layer.input_grad(grad, x, weight + change)
            else:
                grad_x = layer.input_grad(grad, x, weight) + layer.input_grad(grad, x, change.to(x.dtype))
        if ctx.needs_input_grad[4]:
            grad_bias = layer.bias_grad(grad)
        grad_weight = layer.weight_grad(grad, x, weight).flatten(1)
        widest = functools.reduce(torch.promote_types, [factor.dtype for factor in factors])
        grads = form.vjp(grad_weight.to(widest))
        return None, None, grad_x, None, grad_bias, *grads


def branch_sum(
    layer: LayerMap, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]
) -> Tensor:
    """``layer(x)`` with ``weight`` and ``bias``, plus every term's ``coefficient * layer(inputs)``."""
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
            branches.append(
                (weight_space_product(layer, inputs, torch.zeros_like(weight), None, expression), coefficient)
            )
    y = (
        layer.product(x, weight, bias)
        if dense is None
        else weight_space_product(layer, x, weight, bias, dense)
    )
    for branch, coefficient in branches:
        y = torch.add(y, branch, alpha=coefficient)
    return y


def weight_space_product(
    layer: LayerMap, x: Tensor, weight: Tensor, bias: Tensor | None, change: Expression
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return WeightSpaceProduct.apply(layer, change, x, weight, bias, *change.tensors())


def chain_product(
    layer: LayerMap, x: Tensor, weight: Tensor, bias: Tensor | None, change: Expression, coefficient: float
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return ChainProduct.apply(layer, change, coefficient, x, weight, bias, *change.tensors())
