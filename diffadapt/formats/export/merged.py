"""A whole pipeline with the adapter in its weights, which stock diffusers opens without diffadapt."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
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
from diffadapt.formats.export.verify import Tally, Verdict


def write_merged(
    adapter: Adapter,
    folder: Path,
    changes: Sequence[ExportedLayer],
    dtype: torch.dtype,
    metadata: dict[str, str],
) -> None:
    """Write the pipeline of the adapter, or the bare model it was attached to, all weights in ``dtype``.

    The live model is not touched. No change may give a layer a bias that it did not have.
    """
    pipeline = pipeline_of(adapter)
    model = pipeline or _only_root(adapter)
    with disabled(model):
        model.save_pretrained(folder, safe_serialization=True)
    values: dict[Path, dict[str, Callable[[], Tensor]]] = {}
    for change in changes:
        place = folder / change.component if pipeline else folder
        values.setdefault(place, {}).update(_values(change))
    for place in (folder, *(place for place in folder.iterdir() if place.is_dir())):
        _rewrite(place, values.get(place, {}), dtype)
    _write_sizes(folder, changes, in_pipeline=pipeline is not None)
    (folder / "diffadapt.json").write_text(
        json.dumps(metadata, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )


def verify_merged(folder: Path, changes: Sequence[ExportedLayer], dtype: torch.dtype) -> Verdict:
    """Read the folder's weights back as ``from_pretrained`` does and compare them with the live adapter's."""
    stored: dict[Path, dict[str, Tensor]] = {}
    tally = Tally(torch.float32)
    for change in changes:
        place = folder / change.component if (folder / change.component).is_dir() else folder
        if place not in stored:
            files = [load_file(file) for file in sorted(place.glob("*.safetensors"))]
            stored[place] = {key: tensor for tensors in files for key, tensor in tensors.items()}
        tensors, live, bias = stored[place], change.adapted, with_bias(change.base_bias, change.bias)
        weight = tensors[_stored_name(f"{change.path}.weight", tensors)].double()
        tally.add(weight, live, change.weight, live.to(dtype).double())
        if bias is not None:
            found = tensors[_stored_name(f"{change.path}.bias", tensors)].double()
            tally.add(found, bias, change.base_bias, bias.to(dtype).double())
    status, reason = ("exact", "") if dtype == torch.float32 else ("approximate", "as asked for")
    if not tally.as_meant:
        status, reason = "wrong", "the stored weights are not the live ones"
    return Verdict("diffusers", "0.42.1", status, tally.largest, tally.share, reason)


def lost_in_rounding(changes: Sequence[ExportedLayer], dtype: torch.dtype) -> float:
    """``|W' - rounded W'| / |W' - W|`` over all layers and biases; 0 in float32."""
    if dtype == torch.float32:
        return 0.0
    lost = changed = 0.0
    for change in changes:
        adapted = change.adapted
        lost += (adapted - adapted.to(dtype).double()).square().sum().item()
        changed += (adapted - change.weight).square().sum().item()
        if change.bias is not None and change.base_bias is not None:
            new = change.base_bias + change.bias
            lost += (new - new.to(dtype).double()).square().sum().item()
            changed += change.bias.square().sum().item()
    return (lost / changed) ** 0.5 if changed else 0.0


def replace_folder(temporary: Path, folder: Path) -> None:
    """Put a finished folder in its place; one that was there before is removed last."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def note_on_guidance(adapter: Adapter, changes: Sequence[ExportedLayer]) -> str:
    """What stock diffusers would do wrong with a merged pipeline: nothing, but for a grown table of a DiT."""
    grown = next((change for change in changes if change.num_new_rows), None)
    if grown is None or type(pipeline_of(adapter)).__name__ != "DiTPipeline":
        return ""
    return (
        "stock DiTPipeline takes row 1000 for the null class, which is the last one of this table: open the "
        "folder with `diffadapt sample --base` or diffadapt.pipelines.DiTPipeline, or set guidance_scale=1"
    )


def _write_sizes(folder: Path, changes: Sequence[ExportedLayer], *, in_pipeline: bool) -> None:
    """Where a class table gained rows: its new size in the configurations."""
    gained = {change.component: change.num_new_rows for change in changes if change.num_new_rows}
    for component, rows in gained.items():
        _add(folder / component / "config.json" if in_pipeline else folder / "config.json", SIZE_KEYS, rows)
        if in_pipeline:
            _add(folder / "model_index.json", ("null_class",), rows)


def _add(file: Path, keys: Sequence[str], rows: int) -> None:
    values = json.loads(file.read_text(encoding="utf-8"))
    values |= {key: values[key] + rows for key in keys if isinstance(values.get(key), int)}
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _only_root(adapter: Adapter) -> nn.Module:
    (root,) = adapter.roots.values()
    if not hasattr(root, "save_pretrained"):
        raise ValueError(
            f"a {type(root).__name__} has no save_pretrained; merge with da.merge and save it yourself"
        )
    return root


def _values(change: ExportedLayer) -> dict[str, Callable[[], Tensor]]:
    values: dict[str, Callable[[], Tensor]] = {f"{change.path}.weight": lambda: change.adapted}
    if change.bias is not None:
        values[f"{change.path}.bias"] = lambda: change.base_bias + change.bias
    return values


def _rewrite(folder: Path, values: dict[str, Callable[[], Tensor]], dtype: torch.dtype) -> None:
    """Put values in the place of a model's tensors, and bring all of them to the file's precision."""
    left = dict(values)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for key in list(left):
            if name := _stored_name(key, tensors):
                tensors[name] = left.pop(key)().to(dtype)
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {"format": "pt"}
        cast = {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}
        save_file({key: t.cpu().contiguous() for key, t in cast.items()}, file, header)
    if left:
        raise ValueError(f"{folder} has no place for {next(iter(left))}")


def _stored_name(key: str, tensors: dict[str, Tensor]) -> str | None:
    """A parameter's name in a file; transformers may store a level more or less than the model has."""
    candidates = (key, f"text_model.{key}", key.removeprefix("text_model."))
    return next((name for name in candidates if name in tensors), None)
