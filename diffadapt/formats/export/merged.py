"""Whole pipelines with the adapter in their weights, which stock diffusers opens without diffadapt."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.attach import disabled, pipeline_of
from diffadapt.adapters.class_table import SIZE_KEYS
from diffadapt.formats.emulators import with_bias
from diffadapt.formats.export.exported_layer import ExportedLayer
from diffadapt.formats.export.verify import ErrorSum, Verdict


def write_merged(
    adapter: Adapter,
    folder: Path,
    layers: Sequence[ExportedLayer],
    dtype: torch.dtype,
    metadata: dict[str, str],
) -> None:
    """Writes the pipeline of the adapter, or the bare model it was attached to, all weights in `dtype`.

    The live model is not touched. No change may give a layer a bias that it did not have.
    """
    pipeline = pipeline_of(adapter)
    model = pipeline or _only_root(adapter)
    with disabled(model):
        model.save_pretrained(folder, safe_serialization=True)
    new_values: dict[Path, dict[str, Callable[[], Tensor]]] = {}  # by the folder of their component
    for layer in layers:
        component_folder = folder / layer.component if pipeline else folder
        new_values.setdefault(component_folder, {}).update(_new_values(layer))
    subfolders = [path for path in folder.iterdir() if path.is_dir()]
    for component_folder in [folder, *subfolders]:
        _rewrite(component_folder, new_values.get(component_folder, {}), dtype)
    _write_table_sizes(folder, layers, in_pipeline=pipeline is not None)
    text = json.dumps(metadata, indent=1, sort_keys=True) + "\n"
    (folder / "diffadapt.json").write_text(text, encoding="utf-8")


def verify_merged(folder: Path, layers: Sequence[ExportedLayer], dtype: torch.dtype) -> Verdict:
    """Reads the folder's weights back as `from_pretrained` does and compares them with the live adapter's."""
    stored: dict[Path, dict[str, Tensor]] = {}  # by the folder of their component
    errors = ErrorSum(torch.float32)
    for layer in layers:
        component_folder = folder / layer.component
        if not component_folder.is_dir():
            component_folder = folder
        if component_folder not in stored:
            stored[component_folder] = _load_folder(component_folder)
        tensors = stored[component_folder]
        live = layer.adapted
        weight = tensors[_stored_name(f"{layer.path}.weight", tensors)].double()
        errors.add(weight, live, layer.weight, live.to(dtype).double())
        live_bias = with_bias(layer.base_bias, layer.bias)
        if live_bias is not None:
            bias = tensors[_stored_name(f"{layer.path}.bias", tensors)].double()
            errors.add(bias, live_bias, layer.base_bias, live_bias.to(dtype).double())
    status = "exact"
    reason = ""
    if dtype != torch.float32:
        status = "approximate"
        reason = "as requested"
    if not errors.is_as_written:
        status = "wrong"
        reason = "the stored weights are not the live ones"
    return Verdict("diffusers", "0.42.1", status, errors.largest, errors.share, reason)


def lost_in_rounding(layers: Sequence[ExportedLayer], dtype: torch.dtype) -> float:
    """`|W' - rounded W'| / |W' - W|` over all layers and biases; 0 in float32."""
    if dtype == torch.float32:
        return 0.0
    squared_error = squared_change = 0.0
    for layer in layers:
        adapted = layer.adapted
        squared_error += (adapted - adapted.to(dtype).double()).square().sum().item()
        squared_change += (adapted - layer.weight).square().sum().item()
        if layer.bias is not None and layer.base_bias is not None:
            bias = layer.base_bias + layer.bias
            squared_error += (bias - bias.to(dtype).double()).square().sum().item()
            squared_change += layer.bias.square().sum().item()
    return (squared_error / squared_change) ** 0.5 if squared_change else 0.0


def replace_folder(temporary: Path, folder: Path) -> None:
    """Moves a finished folder to its place; one that was there before is removed last."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def note_on_guidance(adapter: Adapter, layers: Sequence[ExportedLayer]) -> str:
    """A warning about stock diffusers and a DiT whose class table grew; empty for other pipelines."""
    has_new_rows = any(layer.num_new_rows for layer in layers)
    if not has_new_rows or type(pipeline_of(adapter)).__name__ != "DiTPipeline":
        return ""
    return (
        "stock DiTPipeline takes row 1000 for the null class, which is the last one of this table: open the "
        "folder with `diffadapt sample --base` or diffadapt.pipelines.DiTPipeline, or set guidance_scale=1"
    )


def _write_table_sizes(folder: Path, layers: Sequence[ExportedLayer], *, in_pipeline: bool) -> None:
    """Where a class table gained rows: its new size in the configurations."""
    new_rows = {layer.component: layer.num_new_rows for layer in layers if layer.num_new_rows}
    for component, count in new_rows.items():
        component_folder = folder / component if in_pipeline else folder
        _increase(component_folder / "config.json", SIZE_KEYS, count)
        if in_pipeline:
            _increase(folder / "model_index.json", ("null_class",), count)


def _increase(file: Path, keys: Sequence[str], count: int) -> None:
    """Adds `count` to whole numbers of a JSON file."""
    values = json.loads(file.read_text(encoding="utf-8"))
    for key in keys:
        if isinstance(values.get(key), int):
            values[key] += count
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _only_root(adapter: Adapter) -> nn.Module:
    (root,) = adapter.roots.values()
    if not hasattr(root, "save_pretrained"):
        raise ValueError(
            f"a {type(root).__name__} has no save_pretrained; merge with da.merge and save it yourself"
        )
    return root


def _new_values(layer: ExportedLayer) -> dict[str, Callable[[], Tensor]]:
    """What computes a layer's changed parameters, by their names in the model."""
    values: dict[str, Callable[[], Tensor]] = {f"{layer.path}.weight": lambda: layer.adapted}
    if layer.bias is not None:
        values[f"{layer.path}.bias"] = lambda: layer.base_bias + layer.bias
    return values


def _load_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of all safetensors files of a folder."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def _rewrite(folder: Path, new_values: dict[str, Callable[[], Tensor]], dtype: torch.dtype) -> None:
    """Puts new values in the place of a model's tensors, and brings all of them to the file's precision."""
    unplaced = dict(new_values)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for key in list(unplaced):
            name = _stored_name(key, tensors)
            if name is not None:
                compute = unplaced.pop(key)
                tensors[name] = compute().to(dtype)
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {"format": "pt"}
        for key, tensor in tensors.items():
            if tensor.is_floating_point():
                tensor = tensor.to(dtype)
            tensors[key] = tensor.cpu().contiguous()
        save_file(tensors, file, header)
    if unplaced:
        raise ValueError(f"{folder} has no place for {next(iter(unplaced))}")


def _stored_name(key: str, tensors: Mapping[str, Tensor]) -> str | None:
    """A parameter's name in a file; transformers may store a level more or less than the model has."""
    for name in (key, f"text_model.{key}", key.removeprefix("text_model.")):
        if name in tensors:
            return name
    return None
