"""What an adapter changes in every layer, as programs see it: by the layer's name, in forms they can hold."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffadapt.adapter import Adapter
from diffadapt.export.factors import Form, added, form_of, nearest, rows_scaled
from diffadapt.expressions import Dense
from diffadapt.layers import Entry, Record
from diffadapt.merging import folded
from diffadapt.site import Kind


@dataclass(frozen=True)
class Change:
    """``W' = scale * (W + form)``, ``b' = b + bias`` for one layer; strengths are folded in. All float64.

    Attributes:
        component: the model of the pipeline that holds the layer, e.g. ``unet`` or ``text_encoder_2``.
        path: the layer's name in that model.
        kind: what the layer does with its weight.
        layer: the layer itself.
        weight: the frozen ``W``, in its own shape.
        base_bias: the frozen ``b``, None where the layer has none.
        form: the change of the matrix ``(out, fan_in)``; None where only rows are scaled or nothing changes.
        scale: a factor ``(out,)`` for every row; None for ones.
        bias: the change of the bias ``(out,)``; None where it stays.
        adapted: the live adapter's ``W'``, in the weight's own shape.
        approximated: whether ``form`` was cut to a lower rank.
    """

    component: str
    path: str
    kind: Kind
    layer: nn.Module
    weight: Tensor
    base_bias: Tensor | None
    form: Form | None
    scale: Tensor | None
    bias: Tensor | None
    adapted: Tensor
    approximated: bool = False

    @property
    def name(self) -> str:
        return f"{self.component}.{self.path}" if self.component else self.path

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight[0].numel()

    def target(self) -> Tensor:
        """The ``W'`` a file made from ``form`` and ``scale`` should give; ``adapted`` unless approximated."""
        if not self.approximated:
            return self.adapted
        weight = (
            self.weight if self.form is None else self.weight + self.form.matrix().reshape_as(self.weight)
        )
        return weight if self.scale is None else per_row(self.scale, weight) * weight

    def as_dense(self) -> Change:
        """The same change as one difference of the weight, without a row scale."""
        return replace(self, form=Dense((self.adapted - self.weight).flatten(1)), scale=None)

    def cut(self, rank: int) -> Change:
        """The change with a dense form replaced by its nearest of a rank."""
        if not isinstance(self.form, Dense):
            return self
        low = nearest(self.form.matrix(), min(rank, *self.matrix_shape))
        return replace(self, form=low, approximated=True)


def per_row(vector: Tensor, like: Tensor) -> Tensor:
    """A vector ``(out,)`` shaped to multiply a weight."""
    return vector.reshape(-1, *(1,) * (like.dim() - 1))


@torch.no_grad()
def changes_of(adapter: Adapter) -> list[Change]:
    """Every layer an adapter changes; layers that share a weight are listed each."""
    if not adapter.records:
        raise ValueError(
            f"adapter {adapter.name!r} is detached, so it has no weights to compare with; load it"
        )
    names = {
        id(module): (component or _component_of(root), path)
        for component, root in adapter.roots.items()
        for path, module in root.named_modules()
    }
    found = []
    for site in adapter.sites:
        record = adapter.records[site.name]
        entries = adapter.entries(record)
        adapted, biases = folded(record, entries)
        weight = record.base().double()
        form, scale = (None, None) if site.kind == "norm" else _combined(record, entries)
        for layer, new_bias in zip(record.layers, biases, strict=True):
            component, path = names[id(layer)]
            base_bias = record.base_bias(layer)
            base_bias = None if base_bias is None else base_bias.double()
            bias = _bias_change(base_bias, new_bias)
            found.append(
                Change(
                    component,
                    path,
                    site.kind,
                    layer,
                    weight,
                    base_bias,
                    form,
                    scale,
                    bias,
                    adapted.double(),
                )
            )
    return found


def _combined(record: Record, entries: list[Entry]) -> tuple[Form | None, Tensor | None]:
    """``W + sum_i t_i (s_i (W + d_i) - W)`` as ``scale * (W + form)``: the rows of W gain the factor
    ``1 + sum_i t_i (s_i - 1)``, and every change is divided by it."""
    base = record.base()
    updates = [(entry.owner.strength, entry.owner.update(entry.index, base)) for entry in entries]
    scales = [(t, update.scale.double()) for t, update in updates if update.scale is not None]
    scale = None
    if scales:
        scale = 1 + sum(t * (own - 1) for t, own in scales)
        if (scale == 0).any():
            adapted = folded(record, entries)[0].double()
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
    name = type(root).__name__
    if name == "UNet2DConditionModel":
        return "unet"
    return "text_encoder" if name.startswith("CLIPTextModel") else ""
