"""Whether an adapter of PEFT can be stored and merged, found out before it is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from diffadapt.common.safetensors_file import FLOAT_DTYPES

_RELATIVE_ERROR = 1e-2  # of the change of the output; PEFT's own methods stay below 1e-5
_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
)


def check_storable(method: object, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a tensor that an adapter file cannot hold: no dense floats, or memory that two
    tensors share."""
    keys: dict[int, str] = {}
    for key, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{method}: its tensor {key} is {tensor.dtype} ({tensor.layout}), which an adapter file does "
                "not hold, so it could not be saved after training; take another method"
            )
        if tensor.numel() == 0 or tensor.is_meta:
            continue
        other = keys.setdefault(tensor.untyped_storage().data_ptr(), key)
        if other != key:
            raise ValueError(
                f"{method}: its tensors {other} and {key} share memory, which an adapter file does not "
                "hold, so it could not be saved after training; take another method"
            )


@torch.no_grad()
def check_merge(method: object, name: str, wrapper: nn.Module, adapter_name: str) -> None:
    """Compares the forward of a layer of PEFT with that of its merged weight, on one random input.

    Args:
        name: of the layer, for the message.
        wrapper: PEFT's layer, of which nothing else is in use: its tensors are overwritten, and it is merged.

    Raises: ValueError where the two differ, or where PEFT can do one of them only.
    """
    layer = wrapper.float().eval().get_base_layer()
    generator = torch.Generator().manual_seed(0)
    for parameter in wrapper.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    x = _example(layer, generator).to(layer.weight.device)
    try:
        base = layer(x)
        live = wrapper(x)
        wrapper.merge(adapter_names=[adapter_name])
        merged = wrapper.get_base_layer()(x)
        change = (live - base).abs().max()
        error = (merged - live).abs().max()
    except _REFUSALS as failure:
        raise ValueError(
            f"{method} cannot change {name}: {failure!r}; exclude it with '!{name}'"
        ) from failure
    if not error <= _RELATIVE_ERROR * change + 1e-4 * base.abs().max():
        raise ValueError(
            f"{method} on {name}: PEFT's merged weight does not do what its forward does (outputs differ by "
            f"{error:.1e} where the adapter changes them by {change:.1e}), so a merge or an export would not "
            f"be what was trained; exclude it with '!{name}' or take another method"
        )


def smallest_of_each_kind(layers: Sequence[nn.Module]) -> list[int]:
    """The indices of the layers to check: the smallest among those that PEFT computes alike."""
    smallest: dict[tuple, int] = {}
    for index, layer in enumerate(layers):
        kind = (type(layer), layer.bias is None if hasattr(layer, "bias") else None)
        kind += tuple(getattr(layer, option, None) for option in _GEOMETRY)
        best = smallest.setdefault(kind, index)
        if layer.weight.numel() < layers[best].weight.numel():
            smallest[kind] = index
    return sorted(smallest.values())


def _example(layer: nn.Module, generator: torch.Generator) -> Tensor:
    """A random input of a layer."""
    if isinstance(layer, nn.Embedding):
        return torch.randint(layer.num_embeddings, (4,), generator=generator)
    if isinstance(layer, nn.Linear):
        shape = (4, layer.in_features)
    elif isinstance(layer, nn.LayerNorm):
        shape = (4, *layer.normalized_shape)
    elif isinstance(layer, nn.GroupNorm):
        shape = (2, layer.num_channels, 3)
    else:
        sides = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
        shape = (2, layer.in_channels, *(d * (k - 1) + 2 + s for k, d, s in sides))
    return torch.randn(shape, generator=generator)
