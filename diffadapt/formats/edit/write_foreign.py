"""Changes of layers written back under the names, and in the format, of the file they came from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffadapt.algebra.low_rank import LowRank, full_rank_factors, zero_factors
from diffadapt.common.atomic_files import write_atomically
from diffadapt.common.pipeline_components import DENOISERS
from diffadapt.formats.export.diffusers import component_config, factor_keys, has_loader
from diffadapt.formats.export.exported_layer import factor_weights
from diffadapt.formats.foreign import diffusers, peft
from diffadapt.formats.foreign.layer_names import current_name
from diffadapt.formats.foreign.open import ForeignAdapter
from diffadapt.formats.foreign.stored_change import StoredChange

# starts of header keys that describe the tensors of the file, not how they were trained
_OUTDATED = ("diffadapt.", "sshs_", "ss_network_dim", "ss_network_alpha", diffusers.METADATA)


class OutputLayer(NamedTuple):
    """A layer by its name in the file, the shape of its weight, and its change: lora, dense or bias."""

    name: str
    shape: tuple[int, ...]
    change: StoredChange

    @property
    def bias(self) -> Tensor | None:
        return self.change.tensors.get("bias")

    def low_rank(self) -> LowRank:
        """The weight's change as a product of two factors."""
        tensors = self.change.tensors
        out = self.shape[0]
        if self.change.form == "lora":
            return LowRank(tensors["up"], tensors["down"])
        if self.change.form == "dense":
            return full_rank_factors(tensors["weight"].reshape(out, -1))
        return zero_factors(out, torch.Size(self.shape[1:]).numel())

    @property
    def rank(self) -> int:
        return self.low_rank().up.shape[1]


def write_changes(
    layers: Sequence[OutputLayer],
    path: str | Path,
    sources: Sequence[ForeignAdapter],
    metadata: Mapping[str, str],
) -> Path:
    """Writes one file, or for PEFT a folder, in the format and precision of the sources.

    Args:
        sources: the adapters that the changes were made from; what their headers agree on is kept.
        metadata: further text for the header.

    Returns:
        The file of tensors.

    Raises:
        ValueError: the format cannot hold a change.
    """
    path = Path(path)
    file_format = sources[0].format
    dtype = _common_dtype(sources)
    header = _common_header(sources) | dict(metadata)
    if file_format == "kohya":
        return _save(_kohya_tensors(layers), path, header, dtype)
    for layer in layers:
        if len(layer.shape) == 1:  # the weight of a norm is a vector
            raise ValueError(f"{layer.name} is a norm, for which {file_format} files have no place")
    if file_format == "diffusers":
        header[diffusers.METADATA] = _diffusers_config(layers)
        return _save(_diffusers_tensors(layers), path, header, dtype)
    config = _peft_config(layers, sources[0].path.with_name(peft.CONFIG))
    file = _save(_peft_tensors(layers), path / peft.TENSORS, header, dtype)
    write_atomically(path / peft.CONFIG, lambda temporary: temporary.write_text(config, encoding="utf-8"))
    return file


def _common_dtype(sources: Sequence[ForeignAdapter]) -> torch.dtype:
    """The smallest precision that holds the tensors of all sources."""
    dtype = None
    for source in sources:
        for change in source.changes.values():
            for tensor in change.tensors.values():
                dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
    return dtype


def _common_header(sources: Sequence[ForeignAdapter]) -> dict[str, str]:
    # two files that were trained differently have no common number of steps
    entries = set(sources[0].header.items())
    for source in sources[1:]:
        entries &= set(source.header.items())
    return {key: value for key, value in sorted(entries) if not key.startswith(_OUTDATED)}


def _save(
    tensors: Iterator[tuple[str, Tensor]], path: Path, header: dict[str, str], dtype: torch.dtype
) -> Path:
    rounded = {}
    for key, tensor in tensors:
        rounded[key] = tensor.to(dtype).contiguous().clone()
        if not rounded[key].isfinite().all():
            raise ValueError(f"{key} does not fit into {dtype}, the precision of the files read")
    write_atomically(path, lambda temporary: save_file(rounded, temporary, {"format": "pt", **header}))
    return path


def _kohya_tensors(layers: Sequence[OutputLayer]) -> Iterator[tuple[str, Tensor]]:
    for layer in layers:
        for key, tensor in _kohya_layer(layer).items():
            yield f"{layer.name}.{key}", tensor


def _kohya_layer(layer: OutputLayer) -> dict[str, Tensor]:
    tensors = layer.change.tensors
    if len(layer.shape) == 1:  # norms have both keys or none
        return {
            "w_norm": tensors["weight"] if "weight" in tensors else torch.zeros(layer.shape),
            "b_norm": torch.zeros(layer.shape) if layer.bias is None else layer.bias,
        }
    keys = {}
    if layer.change.form == "lora":
        # alpha is the rank: multipliers are in the factors
        down, up = factor_weights(layer.low_rank(), layer.shape)
        keys |= {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(float(len(down)))}
    elif layer.change.form == "dense":
        keys["diff"] = tensors["weight"].reshape(layer.shape)
    if layer.bias is not None:
        keys["diff_b"] = layer.bias
    return keys


def _diffusers_tensors(layers: Sequence[OutputLayer]) -> Iterator[tuple[str, Tensor]]:
    components_with_bias = {_component(layer) for layer in layers if layer.bias is not None}
    for layer in layers:
        # an older file's names become today's: the configuration in the header lists these
        component = _component(layer)
        down_key, up_key = factor_keys(component)
        name = current_name(layer.name)
        with_bias = component in components_with_bias
        yield from _lora_tensors(layer, f"{name}.{down_key}", f"{name}.{up_key}", with_bias)


def _peft_tensors(layers: Sequence[OutputLayer]) -> Iterator[tuple[str, Tensor]]:
    with_bias = any(layer.bias is not None for layer in layers)
    for layer in layers:
        name = peft.PREFIX + layer.name
        yield from _lora_tensors(layer, f"{name}.lora_A", f"{name}.lora_B", with_bias)


def _lora_tensors(
    layer: OutputLayer, down_key: str, up_key: str, with_bias: bool
) -> Iterator[tuple[str, Tensor]]:
    down, up = factor_weights(layer.low_rank(), layer.shape)
    yield f"{down_key}.weight", down
    yield f"{up_key}.weight", up
    if with_bias:  # in PEFT's LoRA all layers of a model have one, or none
        yield f"{up_key}.bias", torch.zeros(layer.shape[0]) if layer.bias is None else layer.bias


def _diffusers_config(layers: Sequence[OutputLayer]) -> str:
    """PEFT's configuration of every model; without it, diffusers scales ranks that differ wrong."""
    by_component: dict[str, list[OutputLayer]] = {}
    for layer in layers:
        by_component.setdefault(_component(layer), []).append(layer)
    config: dict[str, object] = {}
    for component, component_layers in by_component.items():
        ranks = {}
        for layer in component_layers:
            path = current_name(layer.name).removeprefix(f"{component}.")
            # PEFT looks for the names of modules, which in transformers 5 lack this level
            ranks[path.removeprefix("text_model.")] = layer.rank
        with_bias = any(layer.bias is not None for layer in component_layers)
        config |= component_config(component, ranks, dora=False, bias=with_bias)
    return json.dumps(config, sort_keys=True)


def _component(layer: OutputLayer) -> str:
    component = current_name(layer.name).partition(".")[0]
    if not has_loader(component):
        raise ValueError(
            f"{layer.name} does not begin with one of {', '.join(DENOISERS)}, text_encoder; give --base"
        )
    return component


def _peft_config(layers: Sequence[OutputLayer], source: Path) -> str:
    """PEFT's configuration of the new folder: alpha is the rank of each layer."""
    old = json.loads(source.read_text(encoding="utf-8"))
    ranks = {layer.name: layer.rank for layer in layers}
    common_rank = Counter(ranks.values()).most_common(1)[0][0]
    other_ranks = {name: rank for name, rank in ranks.items() if rank != common_rank}
    config = {
        "task_type": old.get("task_type"),
        "base_model_name_or_path": old.get("base_model_name_or_path"),
        "auto_mapping": old.get("auto_mapping"),
        "peft_type": "LORA",
        "r": common_rank,
        "lora_alpha": common_rank,
        "target_modules": list(ranks),
        "rank_pattern": other_ranks,
        "alpha_pattern": other_ranks,
        "bias": "none",
        "inference_mode": True,
        "lora_bias": any(layer.bias is not None for layer in layers),
    }
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
