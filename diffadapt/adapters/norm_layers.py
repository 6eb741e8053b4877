"""Norms of torch and diffusers, computed with another weight and bias than the layer holds.

Each function does the layer's own arithmetic, in the precision of the weight that it is given. Norms of
diffusers are known by the names of their classes: not every supported version has all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# layer, input, weight, bias -> output
Normalise = Callable[[nn.Module, Tensor, Tensor, "Tensor | None"], Tensor]


def layer_norm(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.layer_norm(x.to(weight.dtype), layer.normalized_shape, weight, bias, layer.eps).to(x.dtype)


def group_norm(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.group_norm(x.to(weight.dtype), layer.num_groups, weight, bias, layer.eps).to(x.dtype)


def rms_norm(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.RMSNorm`, which has no bias."""
    return F.rms_norm(x.to(weight.dtype), layer.normalized_shape, weight, layer.eps).to(x.dtype)


def _float32_layer_norm(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """diffusers' `FP32LayerNorm`, which computes in float32 whatever its precision is."""
    bias = None if bias is None else bias.float()
    return F.layer_norm(x.float(), layer.normalized_shape, weight.float(), bias, layer.eps).to(x.dtype)


def _diffusers_rms_norm(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """diffusers' `RMSNorm`: the output has the precision of a weight in half precision, else the input's."""
    is_half = layer.weight.dtype in (torch.float16, torch.bfloat16)
    # y = x / sqrt(mean(x^2) + eps) * w + b
    mean_square = x.float().square().mean(-1, keepdim=True)  # (..., 1)
    y = x * torch.rsqrt(mean_square + layer.eps)
    if is_half:
        y = y.to(layer.weight.dtype)  # rounded here, as the layer does
    y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(layer.weight.dtype) if is_half else y


def _zero_centred_rms_norm(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`Krea2RMSNorm`, which multiplies by `1 + weight`."""
    # its weight is stored as the difference from 1
    return F.rms_norm(x.float(), (layer.dim,), weight + 1.0, layer.eps).to(x.dtype)


_DIFFUSERS_NORMS: dict[str, Normalise] = {
    "diffusers.models.normalization.FP32LayerNorm": _float32_layer_norm,
    "diffusers.models.normalization.RMSNorm": _diffusers_rms_norm,
    "diffusers.models.transformers.transformer_krea2.Krea2RMSNorm": _zero_centred_rms_norm,
}


def diffusers_normalise(layer_type: type[nn.Module]) -> Normalise | None:
    """The arithmetic of a norm of diffusers with weights; None for any other class, subclasses included."""
    return _DIFFUSERS_NORMS.get(f"{layer_type.__module__}.{layer_type.__qualname__}")
