"""Linear layers whose weight a quantiser stores: what they are, their product, and their weight as numbers.

Known are the layers of bitsandbytes and diffusers' GGUF, by the names of their classes, and a plain
`nn.Linear` with a weight of torchao. No quantiser is imported before a layer of it is met.

An adapter leaves such a layer's product to the layer: what it adds is computed beside it. Methods get a
`QuantisedWeight` in the place of the weight `W`, a tensor without memory that becomes the matrix of numbers
for the length of one operator that reads it. So a method that never reads it never dequantises it, and
autograd keeps no dense weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class QuantisedKind:
    """How a quantiser stores a weight.

    Attributes:
        name: the quantiser and its format, such as `bitsandbytes nf4`; adapter files record it.
        dequantise: gives the weight of a layer as a matrix `(out, in)` of the quantiser's precision.
        rounds_input: whether the layer's product rounds its input too, so that it is not `x W^T`.
    """

    name: str
    dequantise: Callable[[nn.Linear], Tensor]
    rounds_input: bool = False


class QuantisedLayer:
    """A quantised layer as adapters use it.

    Attributes:
        layer: the layer, adapted or not.
        kind: how its weight is stored.
        layer_class: the layer's class without adapters.
    """

    def __init__(self, layer: nn.Linear, kind: QuantisedKind):
        self.layer = layer
        self.kind = kind
        self.layer_class = type(layer)
        self._row_norms: Tensor | None = None  # (out,)

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    def weight(self) -> QuantisedWeight:
        """The weight, to be dequantised by whoever reads it."""
        return QuantisedWeight(self)

    @torch.no_grad()
    def dequantise(self) -> Tensor:
        """The weight `(out, in)` in float32."""
        return self.kind.dequantise(self.layer).detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """The layer's own output `x W^T + b` for `x (..., in)`; backward computes `W` again."""
        if torch.is_grad_enabled() and x.requires_grad:
            return QuantisedProduct.apply(x, self)
        return self.bare_forward(x)

    def bare_forward(self, x: Tensor) -> Tensor:
        """The forward of the layer's own class, without adapters."""
        return self.layer_class.forward(self.layer, x)

    def times(self, matrix: Tensor) -> Tensor:
        """`W matrix` for a `matrix (in, n)`, by the layer's own product where it does not round its input."""
        # torchao computes in the weight's precision; a layer of bitsandbytes may take its first input's
        compute_dtype = getattr(self.layer, "compute_dtype", self.layer.weight.dtype)
        if self.kind.rounds_input or compute_dtype is None:
            return self.dequantise().to(matrix.dtype) @ matrix
        # W M = (M^T W^T)^T, with the columns of M as the inputs of the layer
        product = self.bare_forward(matrix.T.to(compute_dtype)).to(matrix.dtype)  # (n, out)
        if self.layer.bias is not None:
            product = product - self.layer.bias.to(product.dtype)
        return product.T

    def row_norms(self) -> Tensor:
        """The norms `(out,)` of the rows of `W`, computed once."""
        if self._row_norms is None or self._row_norms.device != self.layer.weight.device:
            self._row_norms = torch.linalg.vector_norm(self.dequantise(), dim=1)
        return self._row_norms


class QuantisedWeight(Tensor):
    """The weight of a quantised layer as a float32 tensor `(out, in)` without memory.

    An operator that reads it gets the dequantised matrix. Two do without: the product `W matrix` is that of
    the layer, and the norms of the rows are computed once.
    """

    source: QuantisedLayer

    @staticmethod
    def __new__(cls, source: QuantisedLayer) -> QuantisedWeight:
        device = source.layer.weight.device
        # shape, dtype and device alone, without a storage
        weight = Tensor._make_wrapper_subclass(
            cls, source.shape, dtype=torch.float32, device=device, storage_size=0
        )
        weight.source = source
        return weight

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        first = args[0]
        # of the whole weight, so the result needs no memory either
        if operator in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(first.source)
        if operator is torch.ops.aten.mm.default and isinstance(first, cls):
            return first.source.times(_dequantised(args[1]))
        # torch.linalg.vector_norm(weight, dim=1), as DoRA takes it
        if operator is torch.ops.aten.linalg_vector_norm.default and args[1:] == (2, [1]) and not kwargs:
            return first.source.row_norms()
        args = tree_map_only(cls, _dequantised, args)
        kwargs = tree_map_only(cls, _dequantised, kwargs or {})
        return operator(*args, **kwargs)

    def __repr__(self) -> str:
        return f"QuantisedWeight({self.source.kind.name}, {tuple(self.shape)})"


class QuantisedProduct(torch.autograd.Function):
    """`y = x W^T + b` by the layer's own forward; `dx = g W`, for which `W` is dequantised again.

    The bias and the weight are frozen. The functions of some quantisers keep a dense weight for backward.
    """

    @staticmethod
    def forward(ctx, x, quantised):
        ctx.quantised = quantised
        ctx.dtype = x.dtype  # x itself is not saved: no gradient depends on it
        return quantised.bare_forward(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        weight = ctx.quantised.dequantise().to(grad.dtype)
        return (grad @ weight).to(ctx.dtype), None


def quantised_layer(layer: nn.Module) -> QuantisedLayer | None:
    """A layer without adapters whose weight is quantised in a known way; None for any other."""
    kind = _kind_of(layer)
    return None if kind is None else QuantisedLayer(layer, kind)


def count_base_parameters(model: nn.Module) -> int:
    """The number of a model's parameters, where a packed weight counts by the values that it means."""
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    for module in model.modules():
        layer_state = getattr(module, "_diffadapt", None)
        quantised = quantised_layer(module) if layer_state is None else layer_state.quantised
        if quantised is not None:
            sizes[id(module.weight)] = module.out_features * module.in_features
    return sum(sizes.values())


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes on this process; of a quantised weight those of its values and scales."""
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's, and sharded ones, which name their mesh too
        names, _ = tensor.__tensor_flatten__()
        parts = [getattr(tensor, name) for name in names]
        return sum(stored_bytes(part) for part in parts if isinstance(part, Tensor))
    count = tensor.numel() * tensor.element_size()
    state = getattr(tensor, "quant_state", None)  # bitsandbytes in 4 bits
    if state is not None:
        parts = state.as_dict(packed=True).values()
        count += sum(part.numel() * part.element_size() for part in parts)
    scales = getattr(tensor, "SCB", None)  # bitsandbytes in 8 bits
    return count if scales is None else count + scales.numel() * scales.element_size()


def _kind_of(layer: nn.Module) -> QuantisedKind | None:
    """How a layer's weight is stored; None where it is not quantised, or not in a known way."""
    # names of classes and not the classes, which only an import of their library would give
    for cls in type(layer).__mro__:
        find_kind = _KIND_BY_CLASS.get(f"{cls.__module__}.{cls.__qualname__}")
        if find_kind is not None:
            return find_kind(layer)
    return _torchao_kind(layer) if type(layer) is nn.Linear else None


def _bitsandbytes_4bit_kind(layer: nn.Linear) -> QuantisedKind | None:
    state = getattr(layer.weight, "quant_state", None)
    if state is None:  # not quantised before it is moved to a device
        return None
    return QuantisedKind(f"bitsandbytes {state.quant_type}", _dequantise_bitsandbytes_4bit)


def _bitsandbytes_8bit_kind(layer: nn.Linear) -> QuantisedKind | None:
    if layer.weight.dtype != torch.int8:  # not quantised before it is moved to a device
        return None
    return QuantisedKind("bitsandbytes int8", _dequantise_bitsandbytes_8bit, rounds_input=True)


def _gguf_kind(layer: nn.Linear) -> QuantisedKind | None:
    quant_type = getattr(layer.weight, "quant_type", None)
    if quant_type is None:
        return None
    return QuantisedKind(f"gguf {quant_type.name.lower()}", _dequantise_gguf)


def _torchao_kind(layer: nn.Linear) -> QuantisedKind | None:
    weight = layer.weight
    is_torchao = type(weight).__module__.partition(".")[0] == "torchao"
    if not is_torchao or not hasattr(weight, "dequantize"):
        return None
    name = type(weight).__name__.removesuffix("Tensor").lower()
    rounds_input = getattr(weight, "act_quant_kwargs", None) is not None  # activations are quantised too
    return QuantisedKind(f"torchao {name}", _dequantise_torchao, rounds_input)


def _dequantise_bitsandbytes_4bit(layer: nn.Linear) -> Tensor:
    from bitsandbytes import functional

    data = layer.weight.data
    state = layer.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):  # CPUs with bf16 have a layout of their own to sample
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
    return functional.dequantize_4bit(data.reshape(-1, 1), state)


def _dequantise_bitsandbytes_8bit(layer: nn.Linear) -> Tensor:
    # the first forward moves values and scales of the rows from the weight to the layer's state
    values = layer.weight.data if layer.state.CB is None else layer.state.CB  # (out, in)
    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB  # (out,)
    return values.float() * (scales.float() / 127)[:, None]  # row i: values_i * largest_i / 127


def _dequantise_gguf(layer: nn.Linear) -> Tensor:
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    return dequantize_gguf_tensor(layer.weight).as_subclass(Tensor).to(layer.compute_dtype)


def _dequantise_torchao(layer: nn.Linear) -> Tensor:
    return layer.weight.dequantize()


# class of a layer -> what finds its kind
_KIND_BY_CLASS = {
    "bitsandbytes.nn.modules.Linear4bit": _bitsandbytes_4bit_kind,
    "bitsandbytes.nn.modules.Linear8bitLt": _bitsandbytes_8bit_kind,
    "diffusers.quantizers.gguf.utils.GGUFLinear": _gguf_kind,
}


def _dequantised(tensor: object) -> object:
    return tensor.source.dequantise() if isinstance(tensor, QuantisedWeight) else tensor
