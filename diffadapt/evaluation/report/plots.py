"""Plots of scores with matplotlib, small enough to be embedded in a page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffadapt.common.atomic_files import write_atomically
from diffadapt.common.contact_sheet import ACCENT, FAINT, INK
from diffadapt.evaluation.record import Score
from diffadapt.evaluation.report.tables import shortened

COLOURS = (ACCENT, "#2b6cb0", "#3d7a3d", "#7b4fa3", "#a8324a", "#5f6b1f", "#1f7a7a", "#555b66")
GRID = "#e5e7eb"
MAX_LABEL = 26  # characters
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "diffadapt",  # the same plot is the same bytes
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class ParetoPoint:
    """One run in a Pareto plot: its cost and its score, with the ends of its interval where it has one."""

    label: str
    cost: float
    value: float
    low: float | None = None
    high: float | None = None


def data_uri(figure: Figure) -> str:
    """A matplotlib figure as an SVG image inside a URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(_render(figure, "svg")).decode()


def save_plot(figure: Figure, path: str | Path) -> None:
    """Writes a matplotlib figure to a file in the format of its suffix."""
    content = _render(figure, Path(path).suffix.removeprefix("."))
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def colour(index: int) -> str:
    """The colour of the n-th set, run or adapter of a plot."""
    return COLOURS[index % len(COLOURS)]


def interval_plot(scores: Sequence[Score]) -> Figure:
    """One metric of every set: values, intervals, and the floor (real against real) as a dashed line."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 0.9 + 0.34 * len(scores)), layout="constrained")
        axes = figure.subplots()
        for index, score in enumerate(scores):
            if score.interval is not None:
                ends = [score.interval.low, score.interval.high]
                axes.plot(ends, [index, index], color=colour(index), lw=3, alpha=0.4)
            axes.plot(score.value, index, "o", color=colour(index), ms=6)
        floors = [score.floor for score in scores if score.floor is not None]
        if floors:
            axes.axvline(floors[0], color=FAINT, ls="--", lw=1)
        axes.set_yticks(range(len(scores)), [_short_label(score.generated) for score in scores])
        axes.set_ylim(len(scores) - 0.4, -0.6)  # the first set on top
        axes.margins(x=0.12)
        hint = {"lower": " (lower is better)", "higher": " (higher is better)"}.get(scores[0].better, "")
        figure.suptitle(scores[0].name + hint, fontsize=9, x=0.02, ha="left")  # may be longer than the axes
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", color=GRID, lw=0.8)
        axes.set_axisbelow(True)
    return figure


def histogram(values: Mapping[str, Sequence[float]], name: str) -> Figure:
    """The distribution of one value of the images, by set.

    Args:
        values: label of a set -> the value of each of its images.
        name: of the value.
    """
    all_values: list[float] = []
    for set_values in values.values():
        all_values += set_values
    finite_values = [value for value in all_values if math.isfinite(value)]
    low, high = _histogram_range(sorted(finite_values))
    num_beyond = 0
    for value in all_values:
        if not low <= value <= high:  # also NaN and infinity
            num_beyond += 1
    bins = min(24, 4 + len(all_values) // (4 * len(values)))  # more for more images of a set
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 2.2 + 0.2 * (len(values) > 1)), layout="constrained")
        axes = figure.subplots()
        for index, (label, set_values) in enumerate(values.items()):
            options = {"bins": bins, "range": (low, high), "color": colour(index)}
            axes.hist(set_values, histtype="stepfilled", alpha=0.35, **options)
            axes.hist(set_values, histtype="step", label=_short_label(label), **options)
        beyond = f" ({num_beyond} beyond)" if num_beyond else ""
        axes.set_title(f"{name} of each image{beyond}", fontsize=10, loc="left")
        axes.set_ylabel("images")
        axes.yaxis.get_major_locator().set_params(integer=True)
        if len(values) > 1:  # below the axes, where it cannot hide a bar
            figure.legend(frameon=False, fontsize=8, loc="outside lower left", ncols=3)
    return figure


def pareto_plot(points: Sequence[ParetoPoint], *, cost: str, score: str, better: str) -> Figure:
    """Score against cost; a line joins the runs that no other run beats in both.

    Args:
        points: the runs.
        cost: label of the x axis.
        score: name of the score.
        better: "lower" or "higher".
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8, 3.4), layout="constrained")
        axes = figure.subplots()
        for index, point in enumerate(points):
            if point.low is not None and point.high is not None:
                ends = [point.low, point.high]
                axes.plot([point.cost, point.cost], ends, color=colour(index), lw=2, alpha=0.4)
            position = (point.cost, point.value)
            axes.plot(*position, "o", color=colour(index), ms=6)
            axes.annotate(_short_label(point.label), position, (6, 4), textcoords="offset points", fontsize=8)
        front = pareto_front(points, better=better)
        front_costs = []
        front_values = []
        for point in front:
            front_costs.append(point.cost)
            front_values.append(point.value)
        axes.plot(front_costs, front_values, color=FAINT, lw=1, ls="--", zorder=0)
        _set_cost_scale(axes, [point.cost for point in points])
        axes.margins(0.15)
        axes.set_xlabel(cost)
        axes.set_ylabel(f"{score} ({better} is better)")
        axes.grid(color=GRID, lw=0.8)
        axes.set_axisbelow(True)
    return figure


def pareto_front(points: Sequence[ParetoPoint], *, better: str) -> list[ParetoPoint]:
    """The points that no other beats in cost and score, by rising cost. `better`: "lower" or "higher"."""
    # sorted by cost, a point is on the front if it scores better than all cheaper ones
    sign = 1 if better == "lower" else -1
    front: list[ParetoPoint] = []
    for point in sorted(points, key=lambda p: (p.cost, sign * p.value)):
        if not front or sign * point.value < sign * front[-1].value:
            front.append(point)
    return front


def _set_cost_scale(axes: Axes, costs: Sequence[float]) -> None:
    """A logarithmic axis for costs of several magnitudes, else whole numbers without an exponent."""
    if min(costs) > 0 and max(costs) > 20 * min(costs):
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")


def _histogram_range(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a histogram of sorted finite values; wide enough for its bins where all values are equal."""
    if not values:
        return 0.0, 1.0
    low = values[0]
    high = _largest_without_outliers(values)
    if high - low > 1e-6 * max(abs(low), abs(high)):
        return low, high
    margin = 0.5 * max(1.0, abs(low))  # equal but for rounding: 24 bins between them would have no width
    return low - margin, high + margin


def _largest_without_outliers(values: Sequence[float]) -> float:
    """The largest of sorted values that is not far beyond most: a near copy has a realism without limit."""
    # Tukey calls values far out from 3 quartile distances on; 10 cuts only what would flatten all others
    lower_quartile = values[len(values) // 4]
    upper_quartile = values[3 * len(values) // 4]
    limit = upper_quartile + 10 * (upper_quartile - lower_quartile)
    return max(value for value in values if value <= limit)


def _render(figure: Figure, file_format: str) -> bytes:
    """A figure as the bytes of a file; the same figure gives the same bytes."""
    content = io.BytesIO()
    metadata = {"Date": None} if file_format == "svg" else None
    with matplotlib.rc_context(STYLE):
        figure.savefig(content, format=file_format, dpi=130, metadata=metadata)
    return content.getvalue()


def _short_label(label: str) -> str:
    """A label, cut in its middle to what fits beside a plot."""
    return shortened(label, MAX_LABEL)
