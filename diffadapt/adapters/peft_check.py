"""Whether an adapter of PEFT can be stored and merged, checked before it is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from diffadapt.adapters.layers import is_norm
from diffadapt.common.safetensors_file import FLOAT_DTYPES

_RELATIVE_ERROR = 1e-2  # of the change of the output; PEFT's own methods stay below 1e-5
_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_PEFT_ERRORS = (  # what PEFT's layers raise for what they cannot do
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
)


def check_storable(method: object, tensors: Mapping[str, Tensor]) -> None:
    """Checks that an adapter file can hold tensors: dense floats that share no memory.

    Args:
        method: the method, for the message.
        tensors: the tensors of the adapter by name.

    Raises:
        ValueError: it cannot hold a tensor; the message names the first one.
    """
    key_by_storage: dict[int, str] = {}
    for key, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{method}: its tensor {key} is {tensor.dtype} ({tensor.layout}), which an adapter file does "
                "not hold, so it could not be saved after training; take another method"
            )
        if tensor.numel() == 0 or tensor.is_meta:  # without memory that they could share
            continue
        first_key = key_by_storage.setdefault(tensor.untyped_storage().data_ptr(), key)
        if first_key != key:
            raise ValueError(
                f"{method}: its tensors {first_key} and {key} share memory, which an adapter file does not "
                "hold, so it could not be saved after training; take another method"
            )


@torch.no_grad()
def check_merge(method: object, name: str, wrapper: nn.Module, adapter_name: str) -> None:
    """Compares the forward of a layer of PEFT with that of its merged weight, on one random input.

    Args:
        method: the method, for the message.
        name: the layer's name, for the message.
        wrapper: PEFT's layer, a copy: its tensors are overwritten, and it is merged.
        adapter_name: the adapter's name in PEFT.

    Raises:
        ValueError: the two differ, or PEFT can do one of them only.
    """
    layer = wrapper.float().eval().get_base_layer()
    generator = torch.Generator().manual_seed(0)
    for parameter in wrapper.parameters():
        if parameter.requires_grad:  # away from the start, which changes nothing
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    # the generator is on the CPU, so that the input is the same on every device
    x = _random_input(layer, generator).to(layer.weight.device)
    try:
        base_output = layer(x)  # before the merge, which writes into this layer
        adapted_output = wrapper(x)
        wrapper.merge(adapter_names=[adapter_name])
        merged_output = wrapper.get_base_layer()(x)
        change = (adapted_output - base_output).abs().max()
        error = (merged_output - adapted_output).abs().max()
    except _PEFT_ERRORS as failure:
        raise ValueError(
            f"{method} cannot change {name}: {failure!r}; exclude it with '!{name}'"
        ) from failure
    # "not <=" refuses NaN too
    if not error <= _RELATIVE_ERROR * change + 1e-4 * base_output.abs().max():
        raise ValueError(
            f"{method} on {name}: PEFT's merged weight does not do what its forward does (outputs differ by "
            f"{error:.1e} where the adapter changes them by {change:.1e}), so a merge or an export would not "
            f"be what was trained; exclude it with '!{name}' or take another method"
        )


def smallest_of_each_kind(layers: Sequence[nn.Module]) -> list[int]:
    """The indices of the layers to check: the smallest of those that PEFT treats alike."""
    smallest: dict[tuple, int] = {}
    for index, layer in enumerate(layers):
        has_no_bias = layer.bias is None if hasattr(layer, "bias") else None  # an embedding has no such field
        geometry = [getattr(layer, option, None) for option in _GEOMETRY]
        kind = (type(layer), has_no_bias, *geometry)
        best = smallest.setdefault(kind, index)
        if layer.weight.numel() < layers[best].weight.numel():
            smallest[kind] = index
    return sorted(smallest.values())


def _random_input(layer: nn.Module, generator: torch.Generator) -> Tensor:
    """A random input of a layer."""
    if isinstance(layer, nn.Embedding):
        return torch.randint(layer.num_embeddings, (4,), generator=generator)
    if isinstance(layer, nn.Linear):
        shape = (4, layer.in_features)
    elif isinstance(layer, nn.GroupNorm):
        shape = (2, layer.num_channels, 3)
    elif is_norm(layer):
        shape = (4, *layer.weight.shape)
    else:
        # a side that gives at least two outputs: the dilated kernel and one stride more
        geometry = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
        sides = []
        for size, dilation, stride in geometry:
            sides.append(dilation * (size - 1) + 2 + stride)
        shape = (2, layer.in_channels, *sides)
    return torch.randn(shape, generator=generator)
