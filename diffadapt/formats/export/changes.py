"""What an adapter changes in every layer, as programs see it: by the layer's name, in forms they can hold."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.architectures import architecture_of
from diffadapt.adapters.fold import adapted_biases, adapted_weight
from diffadapt.adapters.layers import Entry, LayerState
from diffadapt.algebra.combined_weight import changed_weight, largest_class_table, start_weight
from diffadapt.algebra.full_rank import Dense
from diffadapt.algebra.low_rank import LowRank
from diffadapt.formats.export.export_form import Form, added, form_of, rows_scaled
from diffadapt.methods.site import LayerKind


@dataclass(frozen=True)
class Change:
    """``W' = scale * (W + form)``, ``b' = b + bias`` for one layer; strengths are folded in. All float64.

    What is as large as a weight is made when it is asked for, so that a large model fits into memory.

    Attributes:
        component: the model of the pipeline that holds the layer, e.g. ``unet`` or ``text_encoder_2``.
        path: the layer's name in that model.
        kind: what the layer does with its weight.
        layer: the layer itself.
        layer_state, entries: its frozen weight, and what the adapter does to it.
        factors: the change of the matrix in factors; None where it is whole, or nothing but rows are scaled.
        is_whole: whether the change has no structure.
        scale: a factor ``(out,)`` for every row; None for ones.
        base_bias: the frozen ``b``, None where the layer has none.
        bias: the change of the bias ``(out,)``; None where it stays.
        approximated: whether ``factors`` were cut to a lower rank.
    """

    component: str
    path: str
    kind: LayerKind
    layer: nn.Module
    layer_state: LayerState
    entries: list[Entry]
    factors: Form | None
    is_whole: bool
    scale: Tensor | None
    base_bias: Tensor | None
    bias: Tensor | None
    approximated: bool = False

    @property
    def name(self) -> str:
        return f"{self.component}.{self.path}" if self.component else self.path

    @property
    def shape(self) -> torch.Size:
        return self.layer_state.base().shape

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.shape[0], self.shape[1:].numel()

    @property
    def weight(self) -> Tensor:
        """The frozen ``W`` in its own shape; of a class table that grows, with its new rows as they start."""
        base = self.layer_state.base().double()
        if self.kind != "embedding":
            return base
        return start_weight(base, self.layer_state.updates(self.entries))

    @property
    def gained_rows(self) -> int:
        """Rows that a class table has more than the base's."""
        return len(self.weight) - len(self.layer_state.base()) if self.kind == "embedding" else 0

    @property
    def adapted(self) -> Tensor:
        """The live adapter's ``W'``, in the weight's own shape."""
        return adapted_weight(self.layer_state, self.entries).double()

    @property
    def form(self) -> Form | None:
        """The change of the matrix ``(out, fan_in)``; None where nothing but rows are scaled."""
        if not self.is_whole:
            return self.factors
        adapted = self.adapted
        adapted = adapted if self.scale is None else adapted / per_row(self.scale, adapted)
        return Dense((adapted - self.weight).flatten(1))

    def target(self) -> Tensor:
        """The ``W'`` a file made from ``form`` and ``scale`` should give; ``adapted`` unless approximated."""
        if not self.approximated:
            return self.adapted
        weight = self.weight
        if self.factors is not None:
            weight = weight + self.factors.matrix().reshape_as(weight)
        return weight if self.scale is None else per_row(self.scale, weight) * weight

    def as_whole(self) -> Change:
        """The same change as one difference of the weight, without a row scale."""
        return replace(self, factors=None, is_whole=True, scale=None)

    def factored(self, factors: LowRank, *, approximated: bool) -> Change:
        """The change with other factors in the place of its form."""
        return replace(self, factors=factors, is_whole=False, approximated=approximated)


def per_row(vector: Tensor, like: Tensor) -> Tensor:
    """A vector ``(out,)`` shaped to multiply a weight."""
    return vector.reshape(-1, *(1,) * (like.dim() - 1))


@torch.no_grad()
def changes_of(adapter: Adapter) -> list[Change]:
    """Every layer an adapter changes; layers that share a weight are listed each."""
    if not adapter.layer_states:
        raise ValueError(f"adapter {adapter.name!r} is detached, so it changes no weights; load it")
    names = {
        id(module): (component or _component_of(root), path)
        for component, root in adapter.roots.items()
        for path, module in root.named_modules()
    }
    found = []
    for site in adapter.sites:
        layer_state = adapter.layer_states[site.name]
        entries = adapter.entries(layer_state)
        biases = adapted_biases(layer_state, entries)
        form, scale = (None, None) if site.kind == "norm" else _combined(layer_state, entries)
        whole = site.kind == "norm" or isinstance(form, Dense)
        for layer, new_bias in zip(layer_state.layers, biases, strict=True):
            base_bias = layer_state.base_bias(layer)
            base_bias = None if base_bias is None else base_bias.double()
            known = {"base_bias": base_bias, "bias": _bias_change(base_bias, new_bias), "scale": scale}
            factors = None if whole else form
            change = Change(
                *names[id(layer)], site.kind, layer, layer_state, entries, factors, is_whole=whole, **known
            )
            found.append(change)
    return found


def _combined(layer_state: LayerState, entries: list[Entry]) -> tuple[Form | None, Tensor | None]:
    """``W + sum_i t_i (s_i (W + d_i) - W)`` as ``scale * (W + form)``: the rows of W gain the factor
    ``1 + sum_i t_i (s_i - 1)``, and every change is divided by it."""
    base, updates = layer_state.base(), layer_state.updates(entries)
    if largest_class_table(base, updates) is not None:
        wide = base.double()
        return Dense((changed_weight(wide, updates) - start_weight(wide, updates)).flatten(1)), None
    scales = [(t, update.scale.double()) for t, update in updates if update.scale is not None]
    scale = None
    if scales:
        scale = 1 + sum(t * (own - 1) for t, own in scales)
        if (scale == 0).any():
            adapted = adapted_weight(layer_state, entries).double()
            return Dense((adapted - base.double()).flatten(1)), None
    form = None
    for t, update in updates:
        if update.delta is None or t == 0:
            continue
        own = form_of(update.delta, t * update.multiplier, base.shape)
        if update.scale is not None:
            own = rows_scaled(own, update.scale.double())
        form = own if form is None else added(form, own)
    if scale is None or form is None:
        return form, scale
    return rows_scaled(form, 1 / scale), scale


def _bias_change(base: Tensor | None, new: Tensor | None) -> Tensor | None:
    if new is None:
        return None
    change = new.double() if base is None else new.double() - base
    return change if change.any() else None


def _component_of(root: nn.Module) -> str:
    """The name a bare model would have in a pipeline."""
    if type(root).__name__.startswith("CLIPTextModel"):
        return "text_encoder"
    return architecture_of(root).component
