"""Class tables with more rows than the base's: files that cannot hold them, and pipelines that can."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.attach import pipeline_of
from diffadapt.adapters.class_table import SIZE_KEYS
from diffadapt.formats.export.exported_layer import ExportedLayer


def check_no_new_rows(layers: Sequence[ExportedLayer], target: str) -> None:
    """Raises ValueError where a class table has more rows than the base's."""
    for layer in layers:
        if layer.num_new_rows:
            raise ValueError(
                f"{layer.name}: the class table has {layer.num_new_rows} rows more than the base's, which "
                f"a {target} file cannot hold; use --to merged"
            )


def write_table_sizes(folder: Path, layers: Sequence[ExportedLayer], *, in_pipeline: bool) -> None:
    """Where a class table gained rows: its new size in the configurations of a pipeline or model."""
    new_rows: dict[str, int] = {}  # by component: a DiT has a table in every block, all of one size
    for layer in layers:
        if layer.num_new_rows:
            new_rows[layer.component] = layer.num_new_rows
    for component, count in new_rows.items():
        component_folder = folder / component if in_pipeline else folder
        _increase(component_folder / "config.json", SIZE_KEYS, count)
        if in_pipeline:
            _increase(folder / "model_index.json", ("null_class",), count)


def note_on_guidance(adapter: Adapter, layers: Sequence[ExportedLayer]) -> str:
    """A warning about stock diffusers and a DiT whose class table grew; empty for other pipelines."""
    has_new_rows = any(layer.num_new_rows for layer in layers)
    if not has_new_rows or type(pipeline_of(adapter)).__name__ != "DiTPipeline":
        return ""
    return (
        "stock DiTPipeline takes row 1000 for the null class, which is the last one of this table: open the "
        "folder with `diffadapt sample --base` or diffadapt.pipelines.DiTPipeline, or set guidance_scale=1"
    )


def _increase(file: Path, keys: Sequence[str], count: int) -> None:
    """Adds `count` to whole numbers of a JSON file."""
    values = json.loads(file.read_text(encoding="utf-8"))
    for key in keys:
        if isinstance(values.get(key), int):
            values[key] += count
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
