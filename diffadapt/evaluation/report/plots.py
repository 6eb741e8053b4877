"""Plots of scores with matplotlib, small enough to stand inside a page."""

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
class Point:
    """One run in a Pareto plot: its cost and its score, with an interval where there is one."""

    label: str
    cost: float
    value: float
    low: float | None = None
    high: float | None = None


def data_uri(figure: Figure) -> str:
    """A figure as an SVG image inside a URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(_bytes(figure, "svg")).decode()


def save_plot(figure: Figure, path: str | Path) -> None:
    """A figure in a file; its ending says the format."""
    content = _bytes(figure, Path(path).suffix.removeprefix("."))
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def interval_plot(scores: Sequence[Score]) -> Figure:
    """One metric of every set: value, interval, and real against real as a broken line."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 0.9 + 0.34 * len(scores)), layout="constrained")
        axes = figure.subplots()
        for place, score in enumerate(scores):
            colour = COLOURS[place % len(COLOURS)]
            if score.interval is not None:
                axes.plot(
                    [score.interval.low, score.interval.high], [place, place], color=colour, lw=3, alpha=0.4
                )
            axes.plot(score.value, place, "o", color=colour, ms=6)
        floors = [score.floor for score in scores if score.floor is not None]
        if floors:
            axes.axvline(floors[0], color=FAINT, ls="--", lw=1)
        axes.set_yticks(range(len(scores)), [_short(score.generated) for score in scores])
        axes.set_ylim(len(scores) - 0.4, -0.6)
        axes.margins(x=0.12)
        hint = {"lower": " (lower is better)", "higher": " (higher is better)"}.get(scores[0].better, "")
        figure.suptitle(scores[0].name + hint, fontsize=9, x=0.02, ha="left")  # may be longer than the axes
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", color="#e5e7eb", lw=0.8)
        axes.set_axisbelow(True)
    return figure


def histogram(values: Mapping[str, Sequence[float]], name: str) -> Figure:
    """How one figure of the images is distributed, by set."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 2.2 + 0.2 * (len(values) > 1)), layout="constrained")
        axes = figure.subplots()
        everything = [value for own in values.values() for value in own]
        finite = sorted(value for value in everything if math.isfinite(value))
        span = _histogram_span(finite)
        beyond = sum(not span[0] <= value <= span[1] for value in everything)
        bins = min(24, 4 + len(everything) // (4 * len(values)))
        for place, (label, own) in enumerate(values.items()):
            colour = COLOURS[place % len(COLOURS)]
            axes.hist(own, bins=bins, range=span, histtype="stepfilled", alpha=0.35, color=colour)
            axes.hist(own, bins=bins, range=span, histtype="step", color=colour, label=_short(label))
        more = f" ({beyond} beyond)" if beyond else ""
        axes.set_title(f"{name} of each image{more}", fontsize=10, loc="left")
        axes.set_ylabel("images")
        axes.yaxis.get_major_locator().set_params(integer=True)
        if len(values) > 1:  # below, where no bar can stand behind it
            figure.legend(frameon=False, fontsize=8, loc="outside lower left", ncols=3)
    return figure


def pareto_plot(points: Sequence[Point], *, cost: str, score: str, better: str) -> Figure:
    """Score against cost, the runs that no other beats in both joined by a line."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8, 3.4), layout="constrained")
        axes = figure.subplots()
        for place, point in enumerate(points):
            colour = COLOURS[place % len(COLOURS)]
            if point.low is not None and point.high is not None:
                axes.plot([point.cost] * 2, [point.low, point.high], color=colour, lw=2, alpha=0.4)
            axes.plot(point.cost, point.value, "o", color=colour, ms=6)
            axes.annotate(
                _short(point.label), (point.cost, point.value), (6, 4), textcoords="offset points", fontsize=8
            )
        front = pareto_front(points, better=better)
        axes.plot([p.cost for p in front], [p.value for p in front], color=FAINT, lw=1, ls="--", zorder=0)
        _cost_axis(axes, [point.cost for point in points])
        axes.margins(0.15)
        axes.set_xlabel(cost)
        axes.set_ylabel(f"{score} ({better} is better)")
        axes.grid(color="#e5e7eb", lw=0.8)
        axes.set_axisbelow(True)
    return figure


def pareto_front(points: Sequence[Point], *, better: str) -> list[Point]:
    """The points that no other beats in cost and score, by rising cost. `better`: "lower" or "higher"."""
    sign = 1 if better == "lower" else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, sign * p.value)):
        if not front or sign * point.value < sign * front[-1].value:
            front.append(point)
    return front


def _cost_axis(axes: Axes, costs: Sequence[float]) -> None:
    if min(costs) > 0 and max(costs) > 20 * min(costs):
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")


def _histogram_span(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a histogram of sorted finite values; wide enough for its bins where all values are equal."""
    if not values:
        return 0.0, 1.0
    low = values[0]
    high = _without_outliers(values)
    if high - low > 1e-6 * max(abs(low), abs(high)):
        return low, high
    margin = 0.5 * max(1.0, abs(low))  # equal but for rounding: 24 bins between them would have no width
    return low - margin, high + margin


def _without_outliers(values: Sequence[float]) -> float:
    """The largest of sorted values that is not far beyond most: a near copy has a realism without limit."""
    quarter, most = values[len(values) // 4], values[3 * len(values) // 4]
    limit = most + 10 * (most - quarter)
    return max(value for value in values if value <= limit)


def _bytes(figure: Figure, kind: str) -> bytes:
    content = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(content, format=kind, dpi=130, metadata=metadata)
    return content.getvalue()


def _short(label: str, length: int = 26) -> str:
    """A label cut in its middle to what fits beside a plot."""
    return shortened(label, length)
