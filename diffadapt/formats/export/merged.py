"""Whole pipelines with the adapter in their weights, which stock diffusers opens without diffadapt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.attach import disabled, pipeline_of
from diffadapt.formats.emulators import with_bias
from diffadapt.formats.export.checks import check_no_new_biases, check_not_quantised
from diffadapt.formats.export.class_rows import write_table_sizes
from diffadapt.formats.export.exported_layer import ExportedLayer
from diffadapt.formats.export.target import ExportJob, ExportTarget
from diffadapt.formats.export.verify import ErrorSum, Verdict


def _fit(job: ExportJob) -> Sequence[ExportedLayer]:
    check_not_quantised(job.layers)
    check_no_new_biases(job.layers, "merged")
    return job.layers


def _write(job: ExportJob, folder: Path) -> None:
    """Writes the pipeline of the adapter, or the bare model it was attached to, all weights in `job.dtype`.

    The live model is not touched. No change may give a layer a bias that it did not have.
    """
    pipeline = pipeline_of(job.adapter)
    model = pipeline or _only_root(job.adapter)
    with disabled(model):  # the weights of the base, under the names that stock diffusers reads
        model.save_pretrained(folder, safe_serialization=True)
    new_values: dict[Path, dict[str, Callable[[], Tensor]]] = {}  # by the folder of their component
    for layer in job.layers:
        component_folder = folder / layer.component if pipeline else folder
        new_values.setdefault(component_folder, {}).update(_new_values(layer))
    subfolders = [path for path in folder.iterdir() if path.is_dir()]
    for component_folder in [folder, *subfolders]:
        _rewrite(component_folder, new_values.get(component_folder, {}), job.dtype)
    write_table_sizes(folder, job.layers, in_pipeline=pipeline is not None)


def _verify(job: ExportJob, folder: Path) -> list[Verdict]:
    """Reads the folder's weights back as `from_pretrained` does and compares them with the live adapter's."""
    stored: dict[Path, dict[str, Tensor]] = {}  # by the folder of their component
    # the rounding to `job.dtype` is in the expected values, so it needs no tolerance
    errors = ErrorSum(torch.float32)
    for layer in job.layers:
        component_folder = folder / layer.component
        if not component_folder.is_dir():  # a bare model, saved without a pipeline around it
            component_folder = folder
        if component_folder not in stored:
            stored[component_folder] = _load_folder(component_folder)
        tensors = stored[component_folder]
        adapted = layer.adapted
        weight = tensors[_stored_name(f"{layer.path}.weight", tensors)].double()
        errors.add(weight, adapted, layer.weight, adapted.to(job.dtype).double())
        adapted_bias = with_bias(layer.base_bias, layer.bias)
        if adapted_bias is not None:
            bias = tensors[_stored_name(f"{layer.path}.bias", tensors)].double()
            errors.add(bias, adapted_bias, layer.base_bias, adapted_bias.to(job.dtype).double())
    verdict = errors.verdict(
        "diffusers",
        "0.42.1",
        is_approximate=job.dtype != torch.float32,
        wrong="the stored weights are not the live ones",
    )
    return [verdict]


def _only_root(adapter: Adapter) -> nn.Module:
    (root,) = adapter.roots.values()
    if not hasattr(root, "save_pretrained"):
        raise ValueError(
            f"a {type(root).__name__} has no save_pretrained; merge with da.merge and save it yourself"
        )
    return root


def _new_values(layer: ExportedLayer) -> dict[str, Callable[[], Tensor]]:
    """What computes a layer's changed parameters, by their names in the model."""
    # functions: only one changed weight of a large model is in memory at a time
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
    # a large model is split over several files
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


MERGED = ExportTarget(
    name="merged",
    ending="_merged",
    meant_for=("diffusers",),
    fit=_fit,
    write=_write,
    verify=_verify,
)
