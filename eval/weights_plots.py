"""The plots of weights.py: sizes and ranks by layer, SuperLoRA's Figure 11, 1LoRA's Figure 9."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import matplotlib
from matplotlib.figure import Figure

from diffadapt.evaluation.adapter_analysis import LayerFigures
from diffadapt.evaluation.report.plots import COLOURS, STYLE

Figures = Mapping[str, Sequence[LayerFigures]]

BY_LAYER = {
    "norm": "norm of the change",
    "effective_rank": "effective rank",
    "amplification": "amplification",
}
GEOMETRY = {"left": "d_L", "right": "d_R", "distance": "d_E"}


def plots(figures: Figures, *, against_dense: bool) -> dict[str, Figure]:
    """Name -> figure, of all plots that have something to show."""
    with matplotlib.rc_context(STYLE):
        found = {"layers": by_layer(figures)}
        if against_dense:
            found["geometry"] = geometry(figures)
        if any(layer.alignment for layers in figures.values() for layer in layers):
            found["alignment"] = alignments(figures)
    return found


def by_layer(figures: Figures) -> Figure:
    """Each figure of BY_LAYER over the layers in the model's order."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    for axes, (name, heading) in zip(
        figure.subplots(len(BY_LAYER), sharex=True), BY_LAYER.items(), strict=True
    ):
        for place, (label, layers) in enumerate(figures.items()):
            points = [(i, v) for i, layer in enumerate(layers) if (v := getattr(layer, name)) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", ms=3, lw=1, color=_colour(place), label=label)
        axes.set_ylabel(heading)
        axes.set_ylim(bottom=0)
    axes.set_xlabel("layer")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def geometry(figures: Figures) -> Figure:
    """d_L, d_R and d_E against each other, a point per layer (SuperLoRA, Figure 11)."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for axes, (x, y) in zip(figure.subplots(1, 3), combinations(GEOMETRY, 2), strict=True):
        for place, (label, layers) in enumerate(figures.items()):
            known = [(getattr(layer, x), getattr(layer, y)) for layer in layers]
            known = [pair for pair in known if None not in pair]
            if known:
                axes.plot(*zip(*known, strict=True), "o", ms=4, alpha=0.6, color=_colour(place), label=label)
        axes.set_xlabel(GEOMETRY[x])
        axes.set_ylabel(GEOMETRY[y])
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def alignments(figures: Figures) -> Figure:
    """|cosine| of principal directions with the compression vectors, mean over layers (1LoRA, Figure 9)."""
    figure = Figure(figsize=(9, 3.2 * math.ceil(len(figures) / 2)), layout="constrained")
    panels = figure.subplots(math.ceil(len(figures) / 2), min(2, len(figures)), squeeze=False, sharey=True)
    for axes, (label, layers) in zip(panels.flat, figures.items(), strict=False):
        for place, name in enumerate(("summation", "random", "learned")):
            curves = [layer.alignment[name] for layer in layers if name in layer.alignment]
            if curves:
                means = mean_curve(curves)
                axes.plot(range(1, 1 + len(means)), means, "o-", ms=3, color=_colour(place), label=name)
        axes.set_title(label, fontsize=10, loc="left")
        axes.set_xlabel("principal direction")
        axes.set_ylim(0, 1)
    panels.flat[0].set_ylabel("|cosine|")
    panels.flat[0].legend(frameon=False, fontsize=8)
    for axes in panels.flat[len(figures) :]:
        axes.set_visible(False)
    return figure


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """The mean at every place over the curves that reach it."""
    longest = max(map(len, curves))
    columns = ([curve[i] for curve in curves if len(curve) > i] for i in range(longest))
    return [sum(column) / len(column) for column in columns]


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]
