"""What adapters did to the weights, layer by layer, alone or against a dense fine-tune.

    python eval/weights.py runs/dog/adapter.safetensors
    python eval/weights.py lora.safetensors flora.safetensors --dense full.safetensors --output runs/weights

The dense fine-tune is an adapter file of method `full`, trained (`--adapter full`) or taken from a fine-tuned
pipeline (`diffadapt extract --adapter full`). Writes weights.json, weights.md and plots.
"""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import weights_plots

import diffadapt as da
from diffadapt.adapters.adapter import Adapter
from diffadapt.common.atomic_files import check_writable_folder, write_atomically
from diffadapt.common.exit_codes import run_command
from diffadapt.common.number_ranges import require_at_least, require_seed
from diffadapt.common.runtime import silence_libraries
from diffadapt.common.strict_json import to_json
from diffadapt.evaluation.adapter_analysis import LayerFigures, analyse
from diffadapt.evaluation.report.plots import save_plot
from diffadapt.evaluation.report.tables import markdown_table, number
from diffadapt.formats.adapter_file import base_named_in
from diffadapt.models.open_pipeline import open_pipeline

COLUMNS = {  # heading -> field of LayerFigures
    "norm of dW": "norm",
    "relative to W": "relative_norm",
    "norm of db": "bias_norm",
    "effective rank": "effective_rank",
    "amplification": "amplification",
    "d_L": "left",
    "d_R": "right",
    "d_E": "distance",
}


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    check_writable_folder(arguments.output)
    require_at_least(arguments, {"k": 1, "rank": 1, "directions": 1, "seed": 0})
    require_seed(arguments.seed)
    silence_libraries()
    labels = unique_labels(arguments.adapters)
    base = arguments.base or base_named_in(arguments.adapters)
    pipe = open_pipeline(base)
    adapters = {label: da.load(pipe, path, name=label) for label, path in labels.items()}
    dense = None if arguments.dense is None else load_dense(pipe, arguments.dense)
    chosen = {name: getattr(arguments, name) for name in ("k", "rank", "directions", "seed")}
    figures = analyse(adapters, dense, **chosen)
    folder = Path(arguments.output)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "base": base,
        "dense": arguments.dense,
        "options": chosen,
        "adapters": {
            label: {
                "file": labels[label],
                "method": str(adapters[label].method),
                "parameters": adapters[label].num_parameters,
                "layers": [dataclasses.asdict(layer) for layer in layers],
            }
            for label, layers in figures.items()
        },
    }
    _write(folder / "weights.json", to_json(record))
    _write(folder / "weights.md", page(figures, adapters))
    plots = weights_plots.plots(figures, against_dense=dense is not None)
    for name, figure in plots.items():
        save_plot(figure, folder / f"{name}.png")
    print("\n".join(summary_table(figures, adapters)))
    print(f"\nlayer by layer in {folder / 'weights.md'}, plots: {', '.join(f'{name}.png' for name in plots)}")
    if dense is None:
        print("next: --dense FULL.safetensors shows how near a dense fine-tune they come (d_L, d_R, d_E)")
    return 0


def unique_labels(paths: Sequence[str]) -> dict[str, str]:
    """A short name for each file: its own, with its folder where that is needed."""
    for parts in range(1, 1 + max(len(Path(path).parts) for path in paths)):
        labels = ["/".join(Path(path).with_suffix("").parts[-parts:]) for path in paths]
        if len(set(labels)) == len(paths):
            return {label.replace(".", "_"): path for label, path in zip(labels, paths, strict=True)}
    raise ValueError("the same adapter file is given twice; give each once")


def load_dense(pipe: object, path: str) -> Adapter:
    """Raises: ValueError for a file of another method."""
    dense = da.load(pipe, path, name="dense fine-tune")
    if "full" not in [part.name for part in dense.method.members]:
        raise ValueError(f"--dense {path} is of method {dense.method}; a dense fine-tune is of method full")
    return dense


def summary_table(figures: dict[str, list[LayerFigures]], adapters: dict[str, Adapter]) -> list[str]:
    """Means over the layers, a row per adapter."""
    rows = []
    for label, layers in figures.items():
        own = adapters[label]
        row = {"adapter": label, "method": str(own.method), "parameters": f"{own.num_parameters:,}"}
        for heading, name in COLUMNS.items():
            values = [value for layer in layers if (value := getattr(layer, name)) is not None]
            row[heading] = number(sum(values) / len(values)) if values else ""
        rows.append({**row, "layers": str(len(layers))})
    return markdown_table(["adapter", "method", "parameters", "layers", *COLUMNS], rows)


def page(figures: dict[str, list[LayerFigures]], adapters: dict[str, Adapter]) -> str:
    """weights.md: the means, then every layer of every adapter."""
    lines = ["# What the adapters did to the weights", "", "Means over the layers:", ""]
    lines += summary_table(figures, adapters)
    for label, layers in figures.items():
        rows = [
            {"layer": layer.name, "shape": "x".join(map(str, layer.shape))}
            | {
                heading: "" if (value := getattr(layer, name)) is None else number(value)
                for heading, name in COLUMNS.items()
            }
            for layer in layers
        ]
        lines += ["", f"## {label}", "", *markdown_table(["layer", "shape", *COLUMNS], rows)]
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("adapters", nargs="+", metavar="ADAPTER", help="adapter files on one base, ours or of other tools")
    add("--dense", help="an adapter file of method full: the reference of d_L, d_R, d_E and the alignment")
    add("--base", help="default: the base named in the files")
    add("--k", type=int, default=5, help="singular vectors compared by d_L and d_R (default: 5)")
    add("--rank", type=int, help="of the amplification factor; default: each method's own, or 8")
    add("--directions", type=int, default=64, help="principal directions of the alignment (default: 64)")
    add("--seed", type=int, default=0, help="of the random vector of the alignment (default: 0)")
    add("--output", default="runs/weights", help="folder (default: runs/weights)")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
