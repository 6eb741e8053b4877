"""The change of every layer as other programs see it: by the layer's name, in forms that their files hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.architectures import architecture_of
from diffadapt.adapters.fold import adapted_biases, adapted_weight
from diffadapt.adapters.layers import Entry, LayerState
from diffadapt.algebra.combined_weight import changed_shape, start_weight, weight_change
from diffadapt.algebra.expression import ExportForm
from diffadapt.algebra.full_rank import Dense, add_forms
from diffadapt.algebra.low_rank import LowRank
from diffadapt.formats.layer_change import bias_difference
from diffadapt.methods.site import LayerKind


@dataclass(frozen=True)
class ExportedLayer:
    """`W' = scale * (W + form)`, `b' = b + bias` for one layer; strengths are folded in. All float64.

    What is as large as a weight is computed on request, so that a large model fits into memory.

    Attributes:
        component: the model of the pipeline that holds the layer, e.g. `unet` or `text_encoder_2`.
        path: the layer's name in that model.
        kind: of the layer.
        layer: the layer itself.
        layer_state: its frozen weight.
        entries: what the adapter does to it.
        factors: the change of the matrix in factors; None where it is dense, or only rows are scaled.
        is_dense: whether the change has no structure.
        scale: a factor `(out,)` for every row; None for ones.
        base_bias: the frozen `b (out,)`; None where the layer has none.
        bias: the change of the bias `(out,)`; None where it stays.
        is_approximated: whether `factors` were cut to a lower rank.
    """

    component: str
    path: str
    kind: LayerKind
    layer: nn.Module
    layer_state: LayerState
    entries: list[Entry]
    factors: ExportForm | None
    is_dense: bool
    scale: Tensor | None
    base_bias: Tensor | None
    bias: Tensor | None
    is_approximated: bool = False

    @property
    def name(self) -> str:
        return f"{self.component}.{self.path}" if self.component else self.path

    @property
    def shape(self) -> torch.Size:
        """Of the frozen weight."""
        return self.layer_state.base().shape

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.shape[0], self.shape[1:].numel()

    @property
    def weight(self) -> Tensor:
        """The frozen `W` in its own shape; of a class table that grows, with its new rows as they start."""
        base = self.layer_state.base().double()
        if self.kind != "embedding":
            return base
        return start_weight(base, self.layer_state.updates(self.entries))

    @property
    def reads_base(self) -> bool:
        """Whether what a file holds of it was computed from the frozen weight: of row scales and of changes
        relative to it."""
        if self.scale is not None:
            return True
        deltas = [update.delta for _, update in self.layer_state.updates(self.entries)]
        return any(delta is not None and delta.depends_on_base for delta in deltas)

    @property
    def num_new_rows(self) -> int:
        """Rows that a class table has more than the base's."""
        if self.kind != "embedding":
            return 0
        return len(self.weight) - len(self.layer_state.base())

    @property
    def adapted(self) -> Tensor:
        """The live adapter's `W'`, in the weight's own shape."""
        return adapted_weight(self.layer_state, self.entries).double()

    @property
    def form(self) -> ExportForm | None:
        """The change of the matrix `(out, fan_in)`; None where only rows are scaled."""
        if not self.is_dense:
            return self.factors
        # form = W' / scale - W
        unscaled = self.adapted
        if self.scale is not None:
            unscaled = unscaled / per_row(self.scale, unscaled)
        return Dense((unscaled - self.weight).flatten(1))

    def expected_weight(self) -> Tensor:
        """The `W'` that a file made from `form` and `scale` should give; `adapted` unless approximated."""
        if not self.is_approximated:
            return self.adapted
        weight = self.weight
        if self.factors is not None:
            weight = weight + self.factors.matrix().reshape_as(weight)
        if self.scale is not None:
            weight = per_row(self.scale, weight) * weight
        return weight

    def as_dense(self) -> ExportedLayer:
        """The same change as one difference of the weight, without a row scale."""
        return replace(self, factors=None, is_dense=True, scale=None)

    def with_factors(self, factors: LowRank, *, is_approximated: bool) -> ExportedLayer:
        """The change with other factors in the place of its form."""
        return replace(self, factors=factors, is_dense=False, is_approximated=is_approximated)


def per_row(vector: Tensor, like: Tensor) -> Tensor:
    """A vector `(out,)` shaped to multiply a weight."""
    return vector.reshape(-1, *(1,) * (like.dim() - 1))


def factor_weights(factors: LowRank, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The factors of a layer's change as weights of layers, as LoRA files hold them.

    Args:
        shape: of the layer's weight, `(out, in / groups, *kernel)`.

    Returns:
        `down (r, in / groups, *kernel)` and `up (out, r, 1, ...)`, of kernel size 1.
    """
    rank = factors.up.shape[1]
    ones = (1,) * (len(shape) - 2)
    return factors.down.reshape(rank, *shape[1:]), factors.up.reshape(shape[0], rank, *ones)


@torch.no_grad()
def exported_layers(adapter: Adapter) -> list[ExportedLayer]:
    """Every layer that an adapter changes; layers that share a weight are listed each.

    Raises:
        ValueError: the adapter is detached.
    """
    if not adapter.layer_states:
        raise ValueError(f"adapter {adapter.name!r} is detached, so it changes no weights; load it")
    names = _names_of_layers(adapter)
    layers = []
    for site in adapter.sites:
        layer_state = adapter.layer_states[site.name]
        entries = adapter.entries(layer_state)
        form = scale = None
        if site.kind != "norm":  # files hold norms as differences
            form, scale = _form_and_scale(layer_state, entries)
        is_dense = site.kind == "norm" or (form is not None and form.is_dense)
        biases = adapted_biases(layer_state, entries)
        for layer, bias in zip(layer_state.layers, biases, strict=True):
            component, path = names[id(layer)]
            base_bias = layer_state.base_bias(layer)
            if base_bias is not None:
                base_bias = base_bias.double()
            layers.append(
                ExportedLayer(
                    component=component,
                    path=path,
                    kind=site.kind,
                    layer=layer,
                    layer_state=layer_state,
                    entries=entries,
                    factors=None if is_dense else form,
                    is_dense=is_dense,
                    scale=scale,
                    base_bias=base_bias,
                    bias=bias_difference(base_bias, bias),
                )
            )
    return layers


def _names_of_layers(adapter: Adapter) -> dict[int, tuple[str, str]]:
    """Component and path of every module of the adapted models, by its id."""
    names = {}
    for component, root in adapter.roots.items():
        component = component or _component_of(root)
        for path, module in root.named_modules():
            names[id(module)] = (component, path)
    return names


def _component_of(root: nn.Module) -> str:
    """The name that a bare model would have in a pipeline."""
    if type(root).__name__.startswith("CLIPTextModel"):
        return "text_encoder"
    return architecture_of(root).component


def _form_and_scale(layer_state: LayerState, entries: list[Entry]) -> tuple[ExportForm | None, Tensor | None]:
    """The form and the row scale of `W' = scale * (W + form)`; None for no change and for ones.

    Of several changes with strengths `t_i`, row scales `s_i` and forms `d_i`,

        W' = W + sum_i t_i (s_i (W + d_i) - W) = scale * W + sum_i t_i s_i d_i
        scale = 1 + sum_i t_i (s_i - 1)
        form = sum_i t_i s_i d_i / scale
    """
    base = layer_state.base()
    updates = layer_state.updates(entries)
    if changed_shape(base, updates) != base.shape:  # a class table with new rows
        return Dense(weight_change(base.double(), updates).flatten(1)), None
    row_changes = [t * (update.scale.double() - 1) for t, update in updates if update.scale is not None]
    scale = 1 + sum(row_changes) if row_changes else None
    # for a row that a scale of 0 erases, `form / scale` does not exist
    if scale is not None and (scale == 0).any():
        adapted = adapted_weight(layer_state, entries).double()
        return Dense((adapted - base.double()).flatten(1)), None
    form = None
    for strength, update in updates:
        if update.delta is None or strength == 0:  # a scale alone, or a change that is turned off
            continue
        added = update.delta.in_float64().export_form(strength * update.multiplier)
        if update.scale is not None:
            added = added.rows_scaled(update.scale.double())
        form = added if form is None else add_forms(form, added)
    if scale is not None and form is not None:
        form = form.rows_scaled(1 / scale)
    return form, scale
