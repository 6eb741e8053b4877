"""Figures of adapters at every weight they change, alone and against a dense fine-tune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from diffadapt.adapters.adapter import Adapter
from diffadapt.common.messages import did_you_mean
from diffadapt.evaluation.adapter_analysis.formulas import (
    Singular,
    alignment,
    amplification_factor,
    compression_vectors,
    effective_rank,
    numerical_rank,
    relative_distance,
    subspace_similarity,
)
from diffadapt.formats.edit.resize_combine import (
    bias_change,
    singular_vectors,
    started_weight,
    weight_change,
)
from diffadapt.methods.site import Site

RANK = 8  # r of the amplification factor for methods without a rank: the one of FLoRA's Figure 4
MATRICES = ("linear", "conv", "embedding")  # kinds whose weights have directions; a norm's is a vector


@dataclass(frozen=True)
class LayerFigures:
    """Figures of one adapter at one weight, seen as a matrix (out, fan_in). None: not defined there.

    Attributes:
        norm: Frobenius norm of the change ``dW = W' - W``.
        relative_norm: the same over the norm of ``W``.
        bias_norm: Euclidean norm of the bias' change.
        effective_rank: see ``effective_rank``; 0 for no change.
        amplification: see ``amplification_factor``.
        left, right, distance: see ``subspace_similarity`` and ``relative_distance``, against the dense one.
        alignment: see ``alignment``: by vector (summation, random, learned), one value per direction.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    norm: float
    relative_norm: float | None
    bias_norm: float
    effective_rank: float | None = None
    amplification: float | None = None
    left: float | None = None
    right: float | None = None
    distance: float | None = None
    alignment: dict[str, list[float]] = field(default_factory=dict)


@torch.no_grad()
def analyse(
    adapters: Mapping[str, Adapter],
    dense: Adapter | None = None,
    *,
    k: int = 5,
    rank: int | None = None,
    directions: int = 64,
    seed: int = 0,
) -> dict[str, list[LayerFigures]]:
    """Figures of every adapter at every weight it changes, one weight in memory at a time.

    Args:
        adapters: by label, attached to one model; each is measured alone, at its strength.
        dense: an adapter of method ``full`` on the same model, the reference of ``left``, ``right``,
            ``distance``; its directions are those of ``alignment``, else the adapter's own are.
        k: directions compared by ``left`` and ``right``.
        rank: of the amplification factor; default: the method's own, or 8.
        directions: how many of them ``alignment`` goes through.
        seed: of the random vector of ``alignment``.

    Raises: ValueError when an adapter and the dense fine-tune have no weight in common.
    """
    _check_common(adapters, dense)
    figures: dict[str, list[LayerFigures]] = {label: [] for label in adapters}
    sites = {site.name: site for adapter in adapters.values() for site in adapter.sites}
    for site in sites.values():
        reference = None if dense is None else _singular(dense, site)
        for label, adapter in adapters.items():
            if site.name in adapter.layer_states:
                own_rank = rank or configured_rank(adapter, site)
                fields, own = _measure(adapter, site, dense, reference, k, own_rank)
                aligned = {} if own is None else _alignments(own, reference, directions, seed)
                figures[label].append(LayerFigures(**fields, alignment=aligned))
    return figures


@torch.no_grad()
def summary(adapter: Adapter) -> dict[str, float]:
    """FLoRA's two curves (Figure 4), averaged over the layers: ``change_norm`` and ``amplification``.

    Exact, and cheap where the change is low-rank; elsewhere it is a singular value decomposition per layer.
    Layers without a value do not count; ``amplification`` is left out where no layer has one.
    """
    norms, factors = [], []
    for site in adapter.sites:
        if (change := _singular(adapter, site)) is None:
            continue
        norms.append(float(change[1].norm()))
        layer_state = adapter.layer_states[site.name]
        weight = started_weight(layer_state, adapter.entries(layer_state)).flatten(1)
        factors.append(amplification_factor(weight, change, rank=configured_rank(adapter, site)))
    known = [factor for factor in factors if factor is not None]
    means = {"change_norm": norms, "amplification": known}
    return {name: sum(values) / len(values) for name, values in means.items() if values}


def _check_common(adapters: Mapping[str, Adapter], dense: Adapter | None) -> None:
    for label, adapter in adapters.items():
        if dense is not None and not set(adapter.layer_states) & set(dense.layer_states):
            first = next(iter(adapter.layer_states))
            raise ValueError(
                f"{label} and the dense fine-tune change no weight in common: {first!r} is not among the "
                f"{len(dense.layer_states)} of the latter{did_you_mean(first, dense.layer_states)}"
            )


def configured_rank(adapter: Adapter, site: Site) -> int:
    """The rank the adapter's method has at a site; 8 for methods without one."""
    if site.name in adapter.ranks:
        return adapter.ranks[site.name]
    ranks = [getattr(part, "rank", None) for part in adapter.method.members if part.supports(site)]
    return next((rank for rank in ranks if rank), RANK)


def _measure(
    adapter: Adapter, site: Site, dense: Adapter | None, reference: Singular | None, k: int, rank: int
) -> tuple[dict[str, object], Singular | None]:
    """The fields of ``LayerFigures`` but the alignment, and the singular vectors of the change."""
    layer_state = adapter.layer_states[site.name]
    entries = adapter.entries(layer_state)
    base = started_weight(layer_state, entries)
    change, bias = weight_change(layer_state, entries), bias_change(layer_state, entries)
    norm = float(change.norm())
    fields: dict[str, object] = {
        "name": site.name,
        "kind": site.kind,
        "shape": site.shape,
        "norm": norm,
        "relative_norm": norm / float(base.norm()) if base.any() else None,
        "bias_norm": 0.0 if bias is None else float(bias.norm()),
    }
    own = _singular(adapter, site)
    if own is not None:
        fields["effective_rank"] = effective_rank(own[1])
        fields["amplification"] = amplification_factor(base.flatten(1), own, rank=rank)
    if own is not None and reference is not None:
        fields["left"], fields["right"] = subspace_similarity(reference, own, k=k)
        target = dense.layer_states[site.name]
        fields["distance"] = relative_distance(weight_change(target, dense.entries(target)), change)
    return fields, own


def _alignments(
    own: Singular, reference: Singular | None, directions: int, seed: int
) -> dict[str, list[float]]:
    """|cosines| of the dense change's input directions, or of the adapter's own, with each vector."""
    left, values, right = reference or own
    fan_in = right.shape[1]
    count = min(directions, numerical_rank(values, (left.shape[0], fan_in)))
    learned = own[2][0] if reference is not None and own[1][0] > 0 else None
    vectors = compression_vectors(fan_in, learned, seed=seed) if count else {}
    return {name: alignment(right[:count], vector).tolist() for name, vector in vectors.items()}


def _singular(adapter: Adapter, site: Site) -> Singular | None:
    """Singular vectors of an adapter's change at a site; None for a norm, or a weight it does not change."""
    if site.kind not in MATRICES or site.name not in adapter.layer_states:
        return None
    layer_state = adapter.layer_states[site.name]
    return singular_vectors(layer_state, adapter.entries(layer_state))
