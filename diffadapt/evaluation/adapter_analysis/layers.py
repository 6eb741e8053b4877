"""Measures of adapters at every weight they change, alone and against a dense fine-tune."""

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
from diffadapt.formats.layer_change import layer_change
from diffadapt.methods.site import Site

DEFAULT_RANK = 8  # of the amplification factor for methods without a rank: that of FLoRA's Figure 4
MATRIX_KINDS = ("linear", "conv", "embedding")  # layers whose weight is a matrix; a norm's is a vector


@dataclass(frozen=True)
class LayerMeasures:
    """Measures of one adapter at one weight, seen as a matrix (out, fan_in). None: not defined there.

    Attributes:
        name: of the layer.
        kind: of the layer: linear, conv, embedding, norm.
        shape: of the weight.
        norm: Frobenius norm of the change `dW = W' - W`.
        relative_norm: the same over the norm of `W`.
        bias_norm: Euclidean norm of the bias' change.
        effective_rank: see `effective_rank`; 0 for no change.
        amplification: see `amplification_factor`.
        left: `d_L` against the dense fine-tune; see `subspace_similarity`.
        right: `d_R` against the dense fine-tune.
        distance: `d_E` against the dense fine-tune; see `relative_distance`.
        alignment: vector (summation, random, learned) -> |cosine| with each direction; see `alignment`.
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
) -> dict[str, list[LayerMeasures]]:
    """Measures every adapter at every weight it changes, one weight in memory at a time.

    Args:
        adapters: by label, attached to one model; each is measured alone, at its strength.
        dense: an adapter of method `full` on the same model, the reference of `left`, `right` and `distance`;
            `alignment` is of its directions. Without it `alignment` is of the adapter's own.
        k: directions compared by `left` and `right`.
        rank: of the amplification factor; None: the method's own, or 8.
        directions: number of directions of `alignment`.
        seed: of the random vector of `alignment`.

    Raises:
        ValueError: an adapter and the dense fine-tune have no weight in common.
    """
    if dense is not None:
        _require_common_weights(adapters, dense)
    measures_of: dict[str, list[LayerMeasures]] = {label: [] for label in adapters}
    sites: dict[str, Site] = {}  # those of all adapters together
    for adapter in adapters.values():
        for site in adapter.sites:
            sites[site.name] = site
    for site in sites.values():
        reference = None if dense is None else _singular_vectors(dense, site)  # once for all adapters
        for label, adapter in adapters.items():
            if site.name not in adapter.layer_states:
                continue
            site_rank = rank or configured_rank(adapter, site)
            measures, change = _measure(adapter, site, dense, reference, k, site_rank)
            aligned = {} if change is None else _alignments(change, reference, directions, seed)
            measures_of[label].append(LayerMeasures(**measures, alignment=aligned))
    return measures_of


@torch.no_grad()
def summary(adapter: Adapter) -> dict[str, float]:
    """FLoRA's two curves (Figure 4), averaged over the layers: `change_norm` and `amplification`.

    Exact, and cheap for low-rank changes; other changes cost a singular value decomposition per layer.
    Layers without a value do not count; `amplification` is left out where no layer has one.
    """
    norms: list[float] = []
    factors: list[float] = []
    for site in adapter.sites:
        change = _singular_vectors(adapter, site)
        if change is None:
            continue
        _, values, _ = change
        norms.append(float(values.norm()))  # the Frobenius norm of the change
        weight = layer_change([adapter], site).start_weight().flatten(1)
        factor = amplification_factor(weight, change, rank=configured_rank(adapter, site))
        if factor is not None:
            factors.append(factor)
    means = {}
    for name, values in {"change_norm": norms, "amplification": factors}.items():
        if values:
            means[name] = sum(values) / len(values)
    return means


def configured_rank(adapter: Adapter, site: Site) -> int:
    """The rank of the adapter's method at a site; 8 for methods without one."""
    if site.name in adapter.ranks:
        return adapter.ranks[site.name]
    for method in adapter.method.members:
        rank = getattr(method, "rank", None)
        if rank and method.supports(site):
            return rank
    return DEFAULT_RANK


def _require_common_weights(adapters: Mapping[str, Adapter], dense: Adapter) -> None:
    for label, adapter in adapters.items():
        if not set(adapter.layer_states) & set(dense.layer_states):
            first = next(iter(adapter.layer_states))
            raise ValueError(
                f"{label} and the dense fine-tune change no weight in common: {first!r} is not among the "
                f"{len(dense.layer_states)} of the latter{did_you_mean(first, dense.layer_states)}"
            )


def _measure(
    adapter: Adapter, site: Site, dense: Adapter | None, reference: Singular | None, k: int, rank: int
) -> tuple[dict[str, object], Singular | None]:
    """The fields of `LayerMeasures` but the alignment, and the singular vectors of the change."""
    in_layer = layer_change([adapter], site)
    weight = in_layer.start_weight()
    change = in_layer.weight_change()
    bias = in_layer.bias_change()
    norm = float(change.norm())
    measures: dict[str, object] = {
        "name": site.name,
        "kind": site.kind,
        "shape": site.shape,
        "norm": norm,
        "relative_norm": norm / float(weight.norm()) if weight.any() else None,
        "bias_norm": 0.0 if bias is None else float(bias.norm()),
    }
    singular = _singular_vectors(adapter, site)
    if singular is not None:
        _, values, _ = singular
        measures["effective_rank"] = effective_rank(values)
        measures["amplification"] = amplification_factor(weight.flatten(1), singular, rank=rank)
    if singular is not None and reference is not None:
        measures["left"], measures["right"] = subspace_similarity(reference, singular, k=k)
        dense_change = layer_change([dense], site).weight_change()
        measures["distance"] = relative_distance(dense_change, change)
    return measures, singular


def _alignments(
    change: Singular, reference: Singular | None, directions: int, seed: int
) -> dict[str, list[float]]:
    """|cosines| of the dense change's input directions, or of the adapter's own, with each vector."""
    u, singular_values, vh = reference or change
    fan_in = vh.shape[1]
    count = min(directions, numerical_rank(singular_values, (u.shape[0], fan_in)))
    if not count:
        return {}
    _, adapter_values, adapter_vh = change
    has_learned = reference is not None and adapter_values[0] > 0
    learned = adapter_vh[0] if has_learned else None  # the adapter's first input direction
    vectors = compression_vectors(fan_in, learned, seed=seed)
    alignments = {}
    for name, vector in vectors.items():
        alignments[name] = alignment(vh[:count], vector).tolist()
    return alignments


def _singular_vectors(adapter: Adapter, site: Site) -> Singular | None:
    """Singular vectors of an adapter's change at a site; None for a norm, or a weight it does not change."""
    if site.kind not in MATRIX_KINDS or site.name not in adapter.layer_states:
        return None
    return layer_change([adapter], site).singular_vectors()
