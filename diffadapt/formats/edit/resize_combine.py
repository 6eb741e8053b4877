"""Adapters made from changes of weights: one of a smaller rank, several as one, with what is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.attach import detach
from diffadapt.adapters.layers import Entry, LayerState
from diffadapt.adapters.targets import TargetSite
from diffadapt.algebra.combined_weight import (
    changed_weight,
    effective_bias,
    largest_class_table,
    start_weight,
)
from diffadapt.algebra.low_rank import LowRank, Reparametrized, Tucker
from diffadapt.formats.export.export_form import low_rank
from diffadapt.formats.foreign.attach import attach_forms
from diffadapt.formats.foreign.stored_change import Form


@torch.no_grad()
def resized(adapter: Adapter, *, rank: int | None = None, energy: float | None = None) -> tuple[dict, float]:
    """Every weight's change cut to a rank by its singular values, biases and norms as they are.

    Args:
        rank: the largest rank of a layer.
        energy: in place of a rank, the share of each layer's squared change to keep, in (0, 1].

    Returns: forms by site name, for ``replaced``; and the share of the whole squared change that is kept.
    """
    if (rank is None) == (energy is None):
        raise ValueError("give either a rank or an energy")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be a whole number >= 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    forms, kept, whole = {}, 0.0, 0.0
    _check_rows([adapter])
    for site in adapter.sites:
        layer_state = adapter.layer_states[site.name]
        entries = adapter.entries(layer_state)
        bias = bias_change(layer_state, entries)
        if site.kind in ("norm", "embedding"):
            change = weight_change(layer_state, entries)
            own = total = change.square().sum().item()
            forms[site.name] = _dense(change, bias)
        else:
            left, values, right = singular_vectors(layer_state, entries)
            total = values.square().sum().item()
            count = max(1, min(rank, len(values)) if rank else rank_for_energy(values, energy))
            own = values[:count].square().sum().item()
            root = values[:count].sqrt()
            factors = {"up": left[:, :count] * root, "down": root[:, None] * right[:count]}
            alone = total == 0 and bias is not None
            forms[site.name] = Form("bias", _named(bias)) if alone else Form("lora", factors | _named(bias))
        kept, whole = kept + own, whole + total
    return forms, kept / whole if whole else 1.0


@torch.no_grad()
def combined(adapters: Sequence[Adapter]) -> tuple[dict, float]:
    """The sum of the changes of adapters on one model, each at its strength.

    Low-rank changes are joined by their factors, others become one whole difference.
    Returns: forms by site name, for ``replaced``; and the relative error of the sum in float32.
    """
    _check_rows(adapters)
    sites = {site.name: site for adapter in adapters for site in adapter.sites}
    forms, lost, whole = {}, 0.0, 0.0
    for name, site in sites.items():
        layer_state = next(a.layer_states[name] for a in adapters if name in a.layer_states)
        entries = [entry for a in adapters if name in a.layer_states for entry in a.entries(layer_state)]
        change, bias = weight_change(layer_state, entries), bias_change(layer_state, entries)
        factors = _factors(layer_state, entries)
        narrow = factors is not None and factors[0].shape[1] < min(site.out, site.fan_in)
        if narrow and site.kind in ("linear", "conv"):
            forms[name] = Form("lora", {"up": factors[0], "down": factors[1]} | _named(bias))
            made = factors[0].float() @ factors[1].float()
        else:
            forms[name] = _dense(change, bias)
            made = change.float().flatten(1) if change.dim() > 1 else change.float()[:, None]
        lost += (made.double() - change.reshape(made.shape)).square().sum().item()
        whole += change.square().sum().item()
    return forms, (lost / whole) ** 0.5 if whole else 0.0


def replaced(adapters: Sequence[Adapter], forms: Mapping[str, Form], *, name: str = "default") -> Adapter:
    """A new adapter with these forms on the layers of the given adapters, which are taken off."""
    roots, found = {}, {}
    for adapter in adapters:
        roots |= adapter.roots
        for site in adapter.sites:
            found[site.name] = TargetSite(site, tuple(adapter.layer_states[site.name].layers), True)
    for adapter in adapters:
        detach(adapter)
    return attach_forms(roots, forms, [found[site] for site in forms], name=name)


def rank_for_energy(values: Tensor, energy: float) -> int:
    """The smallest rank that keeps this share of the sum of squares of falling singular ``values``."""
    squares = values.square()
    if squares.sum() == 0:
        return 1
    shares = squares.cumsum(0) / squares.sum()
    return min(int((shares < energy - 1e-12).sum()) + 1, len(values))


def weight_change(layer_state: LayerState, entries: Sequence[Entry]) -> Tensor:
    """``W' - W`` under the entries, in float64 and in the weight's shape: no small change is rounded away.

    Where a class table grows, ``W`` is ``started_weight``.
    """
    wide, updates = layer_state.base().double(), layer_state.updates(entries)
    if largest_class_table(wide, updates) is not None:
        return (changed_weight(wide, updates) - start_weight(wide, updates)).cpu()
    return sum(strength * (update.weight(wide) - wide) for strength, update in updates).cpu()


def started_weight(layer_state: LayerState, entries: Sequence[Entry]) -> Tensor:
    """``W`` in float64, with the rows that a class table gains as they start."""
    wide = layer_state.base().double()
    is_table = isinstance(layer_state.layers[0], nn.Embedding)
    return (start_weight(wide, layer_state.updates(entries)) if is_table else wide).cpu()


def bias_change(layer_state: LayerState, entries: Sequence[Entry]) -> Tensor | None:
    """``b' - b (out,)`` in float64; None where the bias stays as it is."""
    base = layer_state.base_bias()
    wide = None if base is None else base.double()
    new = effective_bias(wide, wide, layer_state.updates(entries))
    if new is None:
        return None
    change = new.double() - (0 if wide is None else wide)
    return change.cpu() if change.any() else None


def singular_vectors(layer_state: LayerState, entries: Sequence[Entry]) -> tuple[Tensor, Tensor, Tensor]:
    """``U (out, n), S (n,), Vh (n, fan_in)`` of the change; thin products are never multiplied out."""
    factors = _factors(layer_state, entries)
    if factors is None or factors[0].shape[1] >= min(factors[0].shape[0], factors[1].shape[1]):
        return torch.linalg.svd(weight_change(layer_state, entries).flatten(1), full_matrices=False)
    (rows, upper), (columns, lower) = torch.linalg.qr(factors[0]), torch.linalg.qr(factors[1].T)
    left, values, right = torch.linalg.svd(upper @ lower.T)
    return rows @ left, values, right @ columns.T


def _check_rows(adapters: Sequence[Adapter]) -> None:
    for adapter in adapters:
        for site in (site for site in adapter.sites if site.kind == "embedding"):
            layer_state = adapter.layer_states[site.name]
            updates = layer_state.updates(adapter.entries(layer_state))
            if largest_class_table(layer_state.base(), updates) is not None:
                raise ValueError(
                    f"{adapter.method}: its class table has more rows than {site.name} of the base, which no "
                    "difference of weights can hold; keep the adapter as it is"
                )


def _factors(layer_state: LayerState, entries: Sequence[Entry]) -> tuple[Tensor, Tensor] | None:
    """``up`` and ``down`` of the sum where every change is low-rank and no row is scaled."""
    ups, downs = [], []
    for entry in entries:
        update = entry.owner.update(entry.index, layer_state.base())
        delta = update.delta.as_low_rank() if isinstance(update.delta, Reparametrized) else update.delta
        delta = low_rank(delta) if isinstance(delta, Tucker) else delta
        if update.scale is not None or not (delta is None or isinstance(delta, LowRank)):
            return None
        if delta is not None:
            ups.append(entry.owner.strength * update.multiplier * delta.up.double().cpu())
            downs.append(delta.down.double().cpu())
    return (torch.cat(ups, 1), torch.cat(downs, 0)) if ups else None


def _dense(change: Tensor, bias: Tensor | None) -> Form:
    return Form("dense", {"weight": change} | _named(bias))


def _named(bias: Tensor | None) -> dict[str, Tensor]:
    return {} if bias is None else {"bias": bias}
