"""Layers adapted in place: the same objects with the same parameters, under another class.

A layer owns no trained tensor. Its state lists the entries that change it: their owners (states of methods)
compute an update at every forward, and the layer applies it.

    layer._diffadapt   -> LayerState: what happens to the layer's weight
    LayerState.entries -> Entry, one for each method that changes it
    Entry.owner        -> MethodState, one of Adapter.parts: the trained tensors
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffadapt.adapters.norm_layers import (
    Normalise,
    diffusers_normalise,
    group_norm,
    layer_norm,
    rms_norm,
)
from diffadapt.adapters.quantised_layers import QuantisedLayer, quantised_layer
from diffadapt.algebra.autograd import Term, branch_sum, change_product, rescaled_product, scaled_channels
from diffadapt.algebra.combined_weight import (
    changed_shape,
    changed_weight,
    effective_bias,
    to_compute_dtype,
)
from diffadapt.algebra.expression import Update
from diffadapt.algebra.layer_maps import LayerMap, LinearMap, conv_map

_LINEAR_MAP = LinearMap()


class Owner(Protocol):
    """An owner of trained tensors, which says what they change: the state of a method."""

    strength: float

    def update(self, index: int, base: Tensor, *, in_forward: bool = False) -> Update: ...

    def dropout(self, x: Tensor, index: int) -> Tensor: ...

    def move_to(self, device: torch.device) -> None: ...


@dataclass
class Entry:
    """One owner's change of one layer.

    Attributes:
        index: of the layer's site among those of the owner.
        merged: whether the change is folded into the layer's weight now.
    """

    owner: Owner
    index: int
    merged: bool = False


@dataclass
class LayerState:
    """Everything that happens to one weight. Layers that share the weight share its state.

    Attributes:
        layers: those with this weight, as their parameter.
        entries: the changes of all adapters, in the order they were attached.
        original: the base weight's bits while an entry is merged; None while the layers hold them.
        original_biases: the base biases of all layers, for the same time.
        quantised: the weight of a quantised layer; None for a plain one.
    """

    layers: list[nn.Module]
    entries: list[Entry] = field(default_factory=list)
    original: Tensor | None = None
    original_biases: list[Tensor | None] = field(default_factory=list)
    quantised: QuantisedLayer | None = field(init=False)

    def __post_init__(self) -> None:
        self.quantised = quantised_layer(self.layers[0])

    def base(self) -> Tensor:
        """The frozen base weight, whatever is merged; a quantised one is dequantised where it is read."""
        if self.quantised is not None:
            return self.quantised.weight()
        return self.layers[0].weight.detach() if self.original is None else self.original

    def base_bias(self, layer: nn.Module | None = None) -> Tensor | None:
        """The frozen bias of a layer, the first by default; layers that share a weight have their own."""
        if layer is None:
            layer = self.layers[0]
        if self.original is None:
            bias = getattr(layer, "bias", None)
            return None if bias is None else bias.detach()
        for other, original_bias in zip(self.layers, self.original_biases, strict=True):
            if other is layer:
                return original_bias
        raise ValueError(f"{layer} is not a layer of this state")

    def updates(self, entries: Sequence[Entry]) -> list[tuple[float, Update]]:
        """The strengths and changes of entries, outside of a forward."""
        base = self.base()
        return [(entry.owner.strength, entry.owner.update(entry.index, base)) for entry in entries]

    def active(self) -> list[Entry]:
        """The entries that act in the forward pass: neither merged nor at strength 0."""
        active = []
        for entry in self.entries:
            if not entry.merged and entry.owner.strength != 0:
                active.append(entry)
        return active


def layer_state_of(layers: Sequence[nn.Module]) -> LayerState:
    """The state of layers that share a weight: theirs where they are adapted, else a new one."""
    return getattr(layers[0], "_diffadapt", None) or LayerState(list(layers))


class Adapted(nn.Module):
    """The base of all adapted layers: moves what belongs to the layer with it, and guards merged weights."""

    _diffadapt: LayerState

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        layer_state = self._diffadapt
        # the state's own copies, which no layer holds as a buffer; the first of its layers moves them
        if layer_state.original is not None and layer_state.layers[0] is self:
            layer_state.original = fn(layer_state.original)
            biases = layer_state.original_biases
            layer_state.original_biases = [None if bias is None else fn(bias) for bias in biases]
        for entry in layer_state.entries:
            entry.owner.move_to(self.weight.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if self._diffadapt.original is not None and any(name.startswith(prefix) for name in state_dict):
            raise ValueError(
                f"{prefix.rstrip('.')} holds a merged adapter, and weights loaded into it would be lost when "
                "that is taken out again; unmerge, load, merge"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


class AdaptedLinear(Adapted, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        entries = self._diffadapt.active()
        if not entries:
            return nn.Linear.forward(self, x)
        return _adapted_output(self, _LINEAR_MAP, x, entries)


class _AdaptedConv(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        entries = self._diffadapt.active()
        if not entries:
            return super().forward(x)
        is_unbatched = x.dim() == len(self.kernel_size) + 1  # (channels, *size), as torch takes it too
        layer_map, x = conv_map(self, x.unsqueeze(0) if is_unbatched else x)
        y = _adapted_output(self, layer_map, x, entries)  # (batch, out, *size)
        return y.squeeze(0) if is_unbatched else y


class AdaptedConv1d(_AdaptedConv, nn.Conv1d):
    pass


class AdaptedConv2d(_AdaptedConv, nn.Conv2d):
    pass


class AdaptedConv3d(_AdaptedConv, nn.Conv3d):
    pass


class AdaptedEmbedding(Adapted, nn.Embedding):
    def forward(self, indices: Tensor) -> Tensor:
        entries = self._diffadapt.active()
        if not entries:
            return nn.Embedding.forward(self, indices)
        table = _changed_weight(self, entries).to(self.weight.dtype)  # (rows, dim)
        return F.embedding(
            indices, table, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq
        )


class AdaptedNorm(Adapted):
    normalise: ClassVar[Normalise]

    def forward(self, x: Tensor) -> Tensor:
        entries = self._diffadapt.active()
        if not entries:
            return super().forward(x)
        return self.normalise(self, x, _changed_weight(self, entries), _changed_bias(self, entries))


class AdaptedLayerNorm(AdaptedNorm, nn.LayerNorm):
    normalise = staticmethod(layer_norm)


class AdaptedGroupNorm(AdaptedNorm, nn.GroupNorm):
    normalise = staticmethod(group_norm)


class AdaptedRMSNorm(AdaptedNorm, nn.RMSNorm):
    normalise = staticmethod(rms_norm)


class AdaptedOnDemand(Adapted):
    """The base of adapted classes for layers of other libraries, made when `adapted_class` meets one.

    Attributes:
        original: the class of the layer without adapters.
    """

    original: ClassVar[type[nn.Module]]

    def __reduce__(self):
        # a pickle cannot name a class that was made on demand; it names the two that it derives from
        adapted, family, *_ = type(self).__mro__
        return _restore_on_demand, (family, adapted.original), self.__dict__


class AdaptedDiffusersNorm(AdaptedOnDemand, AdaptedNorm):
    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.normalise = staticmethod(diffusers_normalise(cls.original))


class AdaptedQuantised(AdaptedOnDemand):
    def forward(self, x: Tensor) -> Tensor:
        entries = self._diffadapt.active()
        if not entries:
            return super().forward(x)
        return _quantised_output(self, x, entries)


ADAPTED: dict[type[nn.Module], type[Adapted]] = {
    nn.Linear: AdaptedLinear,
    nn.Conv1d: AdaptedConv1d,
    nn.Conv2d: AdaptedConv2d,
    nn.Conv3d: AdaptedConv3d,
    nn.Embedding: AdaptedEmbedding,
    nn.LayerNorm: AdaptedLayerNorm,
    nn.GroupNorm: AdaptedGroupNorm,
    nn.RMSNorm: AdaptedRMSNorm,
}
ORIGINAL: dict[type[nn.Module], type[nn.Module]] = {adapted: plain for plain, adapted in ADAPTED.items()}


def can_adapt(layer: nn.Module) -> bool:
    """Whether a layer, adapted or not, is of a class that adapters can change; subclasses are not."""
    return isinstance(layer, Adapted) or type(layer) in ADAPTED or _family_on_demand(layer) is not None


def is_norm(layer: nn.Module) -> bool:
    """Whether a layer is a norm, also one of a class that cannot be adapted."""
    is_torch_norm = isinstance(layer, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm))
    return is_torch_norm or isinstance(layer, AdaptedNorm) or diffusers_normalise(type(layer)) is not None


def adapted_class(layer: nn.Module) -> type[Adapted]:
    """The class of a layer while an adapter is attached. Raises KeyError for a layer that has none."""
    if isinstance(layer, Adapted):
        return type(layer)
    family = _family_on_demand(layer)
    return ADAPTED[type(layer)] if family is None else _class_on_demand(family, type(layer))


def original_class(layer: Adapted) -> type[nn.Module]:
    """The class of an adapted layer before the adapter was attached."""
    return layer.original if isinstance(layer, AdaptedOnDemand) else ORIGINAL[type(layer)]


def _family_on_demand(layer: nn.Module) -> type[AdaptedOnDemand] | None:
    """What the adapted class of a layer derives from if it is made on demand; else None."""
    if diffusers_normalise(type(layer)) is not None:
        return AdaptedDiffusersNorm
    return None if quantised_layer(layer) is None else AdaptedQuantised


@functools.cache
def _class_on_demand(family: type[AdaptedOnDemand], original: type[nn.Module]) -> type[AdaptedOnDemand]:
    return type(f"Adapted{original.__name__}", (family, original), {"original": original})


def _restore_on_demand(family: type[AdaptedOnDemand], original: type[nn.Module]) -> AdaptedOnDemand:
    """An adapted layer without attributes, for copies and pickles."""
    adapted = _class_on_demand(family, original)
    return adapted.__new__(adapted)


def _adapted_output(layer: Adapted, layer_map: LayerMap, x: Tensor, entries: Sequence[Entry]) -> Tensor:
    """The output of a linear layer or a convolution for the weight `W + sum_i t_i (W'_i - W)`.

    `W'_i = scale_i * (W + m_i delta_i)` is the weight under entry `i`, and `t_i` its strength. Without a
    scale the entry is a term `t_i m_i L(x; delta_i)` beside the layer's own product. With one it has an
    output `y_i` of its own and adds `t_i (y_i - y_bare)`. No matrix `W'_i` is ever built for a low-rank
    change.
    """
    layer_state = layer._diffadapt
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    base = layer.weight
    base_bias = layer.bias
    if layer_state.original is not None:  # another adapter is merged: the base's bits are kept elsewhere
        base = layer_state.original
        base_bias = layer_state.base_bias(layer)
    additive: list[tuple[Entry, Update]] = []
    rescaling: list[tuple[Entry, Update]] = []
    for entry in entries:
        update = entry.owner.update(entry.index, base, in_forward=True)
        if update.scale is None:
            additive.append((entry, update))
        else:
            rescaling.append((entry, update))
    base = base.to(x.dtype)
    # alone at strength 1: y + 1 (y_i - y) is y_i, so y itself is not needed
    if rescaling and len(entries) == 1 and entries[0].owner.strength == 1 and layer_state.original is None:
        return _rescaled_output(layer_map, x, base, base_bias, *rescaling[0])

    terms: list[Term] = []
    bias_updates: list[tuple[float, Update]] = []
    for entry, update in additive:
        strength = entry.owner.strength
        if update.delta is not None:
            terms.append(_term(x, entry, update, strength))
        if update.bias is not None or update.bias_scale is not None:
            bias_updates.append((strength, update))
    # the layer's own weight and bias, which hold what is merged
    bias = effective_bias(base_bias, layer.bias, bias_updates) if bias_updates else layer.bias
    y = branch_sum(layer_map, x, layer.weight.to(x.dtype), bias, terms)
    if rescaling:
        y_bare = branch_sum(layer_map, x, base, base_bias, [])
        for entry, update in rescaling:
            y_entry = _rescaled_output(layer_map, x, base, base_bias, entry, update)
            y = y + entry.owner.strength * (y_entry - y_bare)
    return y


def _rescaled_output(
    layer_map: LayerMap, x: Tensor, base: Tensor, base_bias: Tensor | None, entry: Entry, update: Update
) -> Tensor:
    """The output `scale * (L(x; W) + m L(x; delta)) + b'` under one update that scales rows alone."""
    terms = [] if update.delta is None else [_term(x, entry, update, 1.0)]
    scale = _per_channel(update.scale, x, layer_map)
    if update.bias_scale is update.scale:  # gamma * (y + beta): one product, bit for bit y at gamma = 1
        bias = base_bias
        if update.bias is not None:
            bias = update.bias if base_bias is None else base_bias + update.bias
        return scaled_channels(branch_sum(layer_map, x, base, bias, terms), scale)
    bias = effective_bias(base_bias, base_bias, [(1.0, update)])
    return rescaled_product(layer_map, x, base, bias, scale, terms, recompute=update.recompute)


def _quantised_output(layer: AdaptedQuantised, x: Tensor, entries: Sequence[Entry]) -> Tensor:
    """The output of a quantised layer: its own `y = L(x; W) + b`, and the changes beside it.

    With the strength `t_i` an entry adds `t_i (m_i L(x; delta_i) + b'_i - b)`, or, where it scales rows,
    `t_i (y_i - y)` with `y_i = scale_i * (y + m_i L(x; delta_i)) + b'_i - scale_i * b`.
    """
    layer_state = layer._diffadapt
    base_output = layer_state.quantised.forward(x)  # (..., out)
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    y = base_output
    for entry in entries:
        strength = entry.owner.strength
        update = entry.owner.update(entry.index, layer_state.base(), in_forward=True)
        if update.scale is None:
            y = _with_change(y, x, entry, update, strength)
            bias_change = effective_bias(layer_state.base_bias(layer), None, [(strength, update)])
            if bias_change is not None:
                y = y + bias_change.to(y.dtype)
            continue
        y_entry = _rescaled_quantised_output(layer, base_output, x, entry, update)
        y = y_entry if len(entries) == 1 and strength == 1 else y + strength * (y_entry - base_output)
    return y


def _rescaled_quantised_output(
    layer: AdaptedQuantised, base_output: Tensor, x: Tensor, entry: Entry, update: Update
) -> Tensor:
    """`scale * (y + m L(x; delta)) + b' - scale * b` for the layer's own output `y`, bias `b` included."""
    y = _with_change(base_output, x, entry, update, 1.0)
    bias = layer._diffadapt.base_bias(layer)
    if update.bias_scale is update.scale:  # b' = scale * (b + bias)
        if update.bias is not None:
            y = y + update.bias.to(y.dtype)
        return scaled_channels(y, update.scale)
    changed_bias = effective_bias(bias, bias, [(1.0, update)])
    if bias is None or changed_bias is None:
        return scaled_channels(y, update.scale, changed_bias)
    return scaled_channels(y, update.scale, changed_bias - update.scale * bias)


def _with_change(y: Tensor, x: Tensor, entry: Entry, update: Update, strength: float) -> Tensor:
    """`y + t m L(x; delta)` for one entry."""
    if update.delta is None:
        return y
    change, coefficient, inputs = _term(x, entry, update, strength)
    branch = change_product(_LINEAR_MAP, inputs, change, torch.Size((y.shape[-1], x.shape[-1])))
    return torch.add(y, branch.to(y.dtype), alpha=coefficient)


def _term(x: Tensor, entry: Entry, update: Update, strength: float) -> Term:
    """The change of one entry as a term of the sum."""
    change = update.delta
    if x.dtype == torch.float16:  # whose largest number is 65504
        change = change.for_float16()
    return Term(change, strength * update.multiplier, entry.owner.dropout(x, entry.index))


def _per_channel(vector: Tensor, x: Tensor, layer_map: LayerMap) -> Tensor:
    """A vector `(out,)`, shaped to act on the channels of the layer's output."""
    trailing = x.dim() - 2 if layer_map.channel_dim == 1 else 0  # axes behind the channels of a convolution
    return vector.reshape(-1, *(1,) * trailing)


def _changed_weight(layer: Adapted, entries: Sequence[Entry]) -> Tensor:
    """The whole changed weight, for layers whose weight is small beside their activations."""
    layer_state = layer._diffadapt
    base = layer_state.base()
    updates = layer_state.updates(entries)
    if changed_shape(base, updates) == layer.weight.shape == base.shape:
        return changed_weight(to_compute_dtype(base), updates, resident=layer.weight)
    # rows of a merged class table stand elsewhere than the base's, so all entries are added up again
    return changed_weight(to_compute_dtype(base), layer_state.updates(layer_state.entries))


def _changed_bias(layer: Adapted, entries: Sequence[Entry]) -> Tensor | None:
    layer_state = layer._diffadapt
    updates = layer_state.updates(entries)
    bias = effective_bias(layer_state.base_bias(layer), getattr(layer, "bias", None), updates)
    return None if bias is None else bias.to(to_compute_dtype(layer_state.base()).dtype)
