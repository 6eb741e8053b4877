"""Analyses what adapters changed in the weights, layer by layer, alone or against a dense fine-tune.

    python eval/weights.py runs/dog/adapter.safetensors
    python eval/weights.py lora.safetensors flora.safetensors --dense full.safetensors --output runs/weights

The dense fine-tune is an adapter file of method `full`, trained (`--adapter full`) or extracted from a
fine-tuned pipeline (`diffadapt extract --adapter full`). Writes weights.json, weights.md and plots.
"""

import argparse
import dataclasses
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import matplotlib
from diffusers import DiffusionPipeline
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import diffadapt as da
from diffadapt.adapters.adapter import Adapter
from diffadapt.common.atomic_files import check_writable_folder, write_utf8
from diffadapt.common.exit_codes import run_command
from diffadapt.common.number_ranges import require_at_least, require_seed
from diffadapt.common.runtime import silence_libraries
from diffadapt.common.strict_json import to_json
from diffadapt.evaluation.adapter_analysis import LayerMeasures, analyse
from diffadapt.evaluation.report.plots import STYLE, colour, save_plot
from diffadapt.evaluation.report.tables import markdown_table, number
from diffadapt.formats.adapter_file import base_named_in
from diffadapt.models.open_pipeline import open_pipeline

Measures = Mapping[str, Sequence[LayerMeasures]]  # label of an adapter -> its layers

COLUMNS = {  # heading -> field of LayerMeasures
    "norm of dW": "norm",
    "relative to W": "relative_norm",
    "norm of db": "bias_norm",
    "effective rank": "effective_rank",
    "amplification": "amplification",
    "d_L": "left",
    "d_R": "right",
    "d_E": "distance",
}
PLOTTED_BY_LAYER = {  # field -> axis label
    "norm": "norm of the change",
    "effective_rank": "effective rank",
    "amplification": "amplification",
}
GEOMETRY = {"left": "d_L", "right": "d_R", "distance": "d_E"}  # field -> axis label
VECTORS = ("summation", "random", "learned")  # of the alignment


def main(argv: list[str] | None = None) -> int:
    """Analyses the adapters and writes the files. Returns the exit code."""
    arguments = _parser().parse_args(argv)
    check_writable_folder(arguments.output)
    require_at_least(arguments, {"k": 1, "rank": 1, "directions": 1, "seed": 0})
    require_seed(arguments.seed)
    silence_libraries()
    paths = unique_labels(arguments.adapters)
    base = arguments.base or base_named_in(arguments.adapters)
    pipe = open_pipeline(base)
    adapters = {label: da.load(pipe, path, name=label) for label, path in paths.items()}
    dense = None if arguments.dense is None else load_dense(pipe, arguments.dense)
    options = {name: getattr(arguments, name) for name in ("k", "rank", "directions", "seed")}
    measures = analyse(adapters, dense, **options)

    adapter_records = {}
    for label, layers in measures.items():
        adapter_records[label] = {
            "file": paths[label],
            "method": str(adapters[label].method),
            "parameters": adapters[label].num_parameters,
            "layers": [dataclasses.asdict(layer) for layer in layers],
        }
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "base": base,
        "dense": arguments.dense,
        "options": options,
        "adapters": adapter_records,
    }
    folder = Path(arguments.output)
    write_utf8(folder / "weights.json", to_json(record))
    write_utf8(folder / "weights.md", page(measures, adapters))
    plots = make_plots(measures, against_dense=dense is not None)
    for name, figure in plots.items():
        save_plot(figure, folder / f"{name}.png")
    print("\n".join(summary_table(measures, adapters)))
    plot_files = ", ".join(f"{name}.png" for name in plots)
    print(f"\nlayer by layer in {folder / 'weights.md'}, plots: {plot_files}")
    if dense is None:
        print("next: --dense FULL.safetensors compares them with a dense fine-tune (d_L, d_R, d_E)")
    return 0


def unique_labels(paths: Sequence[str]) -> dict[str, str]:
    """Label -> file; the label is the file's name, with as many of its folders as are needed.

    Raises:
        ValueError: a file is given twice.
    """
    most_parts = max(len(Path(path).parts) for path in paths)
    for num_parts in range(1, 1 + most_parts):
        labels = ["/".join(Path(path).with_suffix("").parts[-num_parts:]) for path in paths]
        if len(set(labels)) == len(paths):
            return {label.replace(".", "_"): path for label, path in zip(labels, paths, strict=True)}
    raise ValueError("the same adapter file is given twice; give each once")


def load_dense(pipe: DiffusionPipeline, path: str) -> Adapter:
    """Loads the dense fine-tune.

    Raises:
        ValueError: the file is of another method than `full`.
    """
    dense = da.load(pipe, path, name="dense fine-tune")
    if "full" not in [member.name for member in dense.method.members]:
        raise ValueError(f"--dense {path} is of method {dense.method}; a dense fine-tune is of method full")
    return dense


def summary_table(measures: Measures, adapters: Mapping[str, Adapter]) -> list[str]:
    """Means over the layers, a row per adapter, as Markdown."""
    rows = []
    for label, layers in measures.items():
        row = {
            "adapter": label,
            "method": str(adapters[label].method),
            "parameters": f"{adapters[label].num_parameters:,}",
            "layers": str(len(layers)),
        }
        for heading, field in COLUMNS.items():
            values = [getattr(layer, field) for layer in layers]
            defined = [value for value in values if value is not None]
            row[heading] = number(sum(defined) / len(defined)) if defined else ""
        rows.append(row)
    return markdown_table(["adapter", "method", "parameters", "layers", *COLUMNS], rows)


def page(measures: Measures, adapters: Mapping[str, Adapter]) -> str:
    """The content of weights.md: the means, then every layer of every adapter."""
    lines = ["# What the adapters did to the weights", "", "Means over the layers:", ""]
    lines += summary_table(measures, adapters)
    for label, layers in measures.items():
        rows = []
        for layer in layers:
            row = {"layer": layer.name, "shape": "x".join(str(size) for size in layer.shape)}
            for heading, field in COLUMNS.items():
                value = getattr(layer, field)
                row[heading] = "" if value is None else number(value)
            rows.append(row)
        lines += ["", f"## {label}", "", *markdown_table(["layer", "shape", *COLUMNS], rows)]
    return "\n".join(lines) + "\n"


def make_plots(measures: Measures, *, against_dense: bool) -> dict[str, Figure]:
    """File name without suffix -> figure, of all plots that have something to show."""
    has_alignment = any(layer.alignment for layers in measures.values() for layer in layers)
    with matplotlib.rc_context(STYLE):
        figures = {"layers": plot_by_layer(measures)}
        if against_dense:
            figures["geometry"] = plot_geometry(measures)
        if has_alignment:
            figures["alignment"] = plot_alignment(measures)
    return figures


def plot_by_layer(measures: Measures) -> Figure:
    """Each measure of PLOTTED_BY_LAYER over the layers in the model's order."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(len(PLOTTED_BY_LAYER), sharex=True)
    for axes, (field, axis_label) in zip(panels, PLOTTED_BY_LAYER.items(), strict=True):
        for index, (label, layers) in enumerate(measures.items()):
            points = [(position, getattr(layer, field)) for position, layer in enumerate(layers)]
            _plot_points(axes, points, "o-", ms=3, lw=1, color=colour(index), label=label)
        axes.set_ylabel(axis_label)
        axes.set_ylim(bottom=0)
    panels[-1].set_xlabel("layer")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def plot_geometry(measures: Measures) -> Figure:
    """d_L, d_R and d_E against each other, a point per layer (SuperLoRA, Figure 11)."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, (x, y) in zip(panels, combinations(GEOMETRY, 2), strict=True):
        for index, (label, layers) in enumerate(measures.items()):
            points = [(getattr(layer, x), getattr(layer, y)) for layer in layers]
            _plot_points(axes, points, "o", ms=4, alpha=0.6, color=colour(index), label=label)
        axes.set_xlabel(GEOMETRY[x])
        axes.set_ylabel(GEOMETRY[y])
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def plot_alignment(measures: Measures) -> Figure:
    """|cosine| of principal directions with the compression vectors, mean over layers (1LoRA, Figure 9)."""
    num_rows = math.ceil(len(measures) / 2)
    figure = Figure(figsize=(9, 3.2 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, min(2, len(measures)), squeeze=False, sharey=True).flat
    for axes, (label, layers) in zip(panels, measures.items(), strict=False):
        for index, vector in enumerate(VECTORS):
            curves = [layer.alignment[vector] for layer in layers if vector in layer.alignment]
            if curves:
                means = mean_curve(curves)
                directions = range(1, 1 + len(means))
                axes.plot(directions, means, "o-", ms=3, color=colour(index), label=vector)
        axes.set_title(label, fontsize=10, loc="left")
        axes.set_xlabel("principal direction")
        axes.set_ylim(0, 1)
    panels[0].set_ylabel("|cosine|")
    panels[0].legend(frameon=False, fontsize=8)
    for axes in panels[len(measures) :]:  # an odd number of adapters leaves one panel empty
        axes.set_visible(False)
    return figure


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """The mean at each position over the curves that reach it."""
    means = []
    for position in range(max(len(curve) for curve in curves)):
        values = [curve[position] for curve in curves if len(curve) > position]
        means.append(sum(values) / len(values))
    return means


def _plot_points(
    axes: Axes, points: Sequence[tuple[float | None, float | None]], marker: str, **style: object
) -> None:
    """Plots the points both of whose coordinates are defined; nothing when there are none."""
    defined = [point for point in points if None not in point]
    if defined:
        x, y = zip(*defined, strict=True)
        axes.plot(x, y, marker, **style)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("adapters", nargs="+", metavar="ADAPTER", help="adapter files on one base, of any supported format")
    add("--dense", help="adapter file of method full: the reference of d_L, d_R, d_E and the alignment")
    add("--base", help="base model (default: the one named in the files)")
    add("--k", type=int, default=5, help="singular vectors compared by d_L and d_R (default: 5)")
    add("--rank", type=int, help="rank of the amplification factor (default: each method's rank, or 8)")
    add("--directions", type=int, default=64, help="principal directions of the alignment (default: 64)")
    add("--seed", type=int, default=0, help="seed of the random vector of the alignment (default: 0)")
    add("--output", default="runs/weights", help="output folder (default: runs/weights)")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
