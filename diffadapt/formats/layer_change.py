"""What adapters change in one layer: as a whole difference, as two thin factors, by its singular vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.adapters.adapter import Adapter
from diffadapt.algebra.combined_weight import changed_shape, effective_bias, start_weight, weight_change
from diffadapt.algebra.expression import Update
from diffadapt.algebra.low_rank import LowRank
from diffadapt.methods.site import Site


@dataclass(frozen=True)
class LayerChange:
    """The change of one layer: `W' = W + sum_i t_i (W'_i - W)`, and the same for its bias.

    Attributes:
        site: name, kind and shape of the layer.
        base: the frozen weight `W`; zeros where the change does not depend on it.
        base_bias: the frozen bias `(out,)`; None where the layer has none.
        updates: strength `t_i` and change of every method.
    """

    site: Site
    base: Tensor
    base_bias: Tensor | None
    updates: Sequence[tuple[float, Update]]

    def start_weight(self) -> Tensor:
        """`W` in float64; of a class table that grows, with its new rows as they start."""
        weight = self.base.double()
        if self.site.kind == "embedding":
            weight = start_weight(weight, self.updates)
        return weight.cpu()

    def weight_change(self) -> Tensor:
        """`W' - start_weight()` in float64, in the weight's own shape."""
        return weight_change(self.base.double(), self.updates).cpu()

    def bias_change(self) -> Tensor | None:
        """`b' - b (out,)` in float64; None where the bias stays as it is."""
        base = None if self.base_bias is None else self.base_bias.double()
        change = bias_difference(base, effective_bias(base, base, self.updates))
        return None if change is None else change.cpu()

    def factors(self) -> LowRank | None:
        """The change as `up (out, r) @ down (r, fan_in)` in float64; None where a part of it is no such
        product, or rows are scaled."""
        ups: list[Tensor] = []  # (out, r_i)
        downs: list[Tensor] = []  # (r_i, fan_in)
        for strength, update in self.updates:
            if update.scale is not None:
                return None
            if update.delta is None:
                continue
            factors = update.delta.thin_factors()
            if factors is None:
                return None
            ups.append(strength * update.multiplier * factors.up.double().cpu())
            downs.append(factors.down.double().cpu())
        if not ups:
            return None
        # sum_i up_i down_i = [up_1 up_2 ...] [down_1; down_2; ...]
        return LowRank(torch.cat(ups, 1), torch.cat(downs, 0))

    def singular_vectors(self) -> tuple[Tensor, Tensor, Tensor]:
        """`U (out, n), S (n,), Vh (n, fan_in)` of the change as a matrix.

        A thin product is never multiplied out: with `up = Q1 R1` and `down^T = Q2 R2` its singular value
        decomposition is that of the small `R1 R2^T`, turned by `Q1` and `Q2`.
        """
        factors = self.factors()
        if factors is None or factors.up.shape[1] >= min(factors.up.shape[0], factors.down.shape[1]):
            # not thin: the factors would save nothing
            return torch.linalg.svd(self.weight_change().flatten(1), full_matrices=False)
        row_basis, upper = torch.linalg.qr(factors.up)  # (out, r), (r, r)
        column_basis, lower = torch.linalg.qr(factors.down.T)  # (fan_in, r), (r, r)
        u, values, vh = torch.linalg.svd(upper @ lower.T)  # (r, r), (r,), (r, r)
        return row_basis @ u, values, vh @ column_basis.T


def layer_change(adapters: Sequence[Adapter], site: Site) -> LayerChange:
    """The change of one layer under those of the attached adapters that change it."""
    updates = []
    for adapter in adapters:
        if site.name in adapter.layer_states:
            state = adapter.layer_states[site.name]
            updates += state.updates(adapter.entries(state))
    return LayerChange(site, state.base(), state.base_bias(), updates)


def layer_changes(adapters: Sequence[Adapter]) -> Iterator[LayerChange]:
    """The changes of all layers that attached adapters change, made one after the other.

    Raises:
        ValueError: a class table has more rows than the base's, so no difference of weights can hold it.
    """
    sites = {}
    for adapter in adapters:
        for site in adapter.sites:
            sites.setdefault(site.name, site)
            _check_rows(adapter, site)
    return (layer_change(adapters, site) for site in sites.values())


def bias_difference(base: Tensor | None, changed: Tensor | None) -> Tensor | None:
    """`changed - base` in float64, where a layer without a bias counts as zeros; None for no change."""
    if changed is None:
        return None
    difference = changed.double() if base is None else changed.double() - base  # (out,)
    return difference if difference.any() else None


def _check_rows(adapter: Adapter, site: Site) -> None:
    if site.kind != "embedding":
        return
    state = adapter.layer_states[site.name]
    base = state.base()
    if changed_shape(base, state.updates(adapter.entries(state))) != base.shape:
        raise ValueError(
            f"{adapter.method}: its class table has more rows than {site.name} of the base, which no "
            "difference of weights can hold; keep the adapter as it is"
        )
