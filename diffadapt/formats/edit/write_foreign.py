"""Changes of layers written back under the names, and in the format, of the file they came from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffadapt.algebra.low_rank import LowRank
from diffadapt.common.atomic_files import write_atomically
from diffadapt.common.pipeline_components import DENOISERS
from diffadapt.formats.export.diffusers import component_config, factor_keys, has_loader
from diffadapt.formats.export.export_form import full_rank, nothing
from diffadapt.formats.foreign import diffusers, peft
from diffadapt.formats.foreign.layer_names import current_name
from diffadapt.formats.foreign.open import Foreign
from diffadapt.formats.foreign.stored_change import Form

# what a header says of the file it was in, not of how it was trained
_STALE = ("diffadapt.", "sshs_", "ss_network_dim", "ss_network_alpha", diffusers.METADATA)


class Layer(NamedTuple):
    """A layer by its name in the file, the shape of its weight, and its change: lora, dense or bias."""

    name: str
    shape: tuple[int, ...]
    form: Form


def write_forms(
    layers: Sequence[Layer], path: str | Path, sources: Sequence[Foreign], metadata: Mapping[str, str]
) -> Path:
    """Write one file, or for PEFT's a folder, in the sources' format, precision and what of their headers
    they agree on. Returns the file of tensors.

    Raises: ValueError for what the format cannot hold.
    """
    path, family = Path(path), sources[0].family
    forms = [form for source in sources for form in source.forms.values()]
    dtype = reduce(torch.promote_types, (tensor.dtype for form in forms for tensor in form.tensors.values()))
    header = _agreed(sources) | dict(metadata)
    if family == "kohya":
        tensors = {f"{layer.name}.{key}": tensor for layer in layers for key, tensor in _kohya(layer)}
        return _save(tensors, path, header, dtype)
    others = [layer.name for layer in layers if len(layer.shape) == 1]
    if others:
        raise ValueError(f"{others[0]} is a norm, for which {family} files have no place")
    if family == "diffusers":
        header[diffusers.METADATA] = _diffusers_config(layers)
        return _save(dict(_diffusers(layers)), path, header, dtype)
    config = _peft_config(layers, sources[0].path.with_name(peft.CONFIG))
    written = _save(dict(_peft(layers)), path / peft.TENSORS, header, dtype)
    write_atomically(path / peft.CONFIG, lambda temporary: temporary.write_text(config, encoding="utf-8"))
    return written


def _save(tensors: Mapping[str, Tensor], path: Path, header: dict[str, str], dtype: torch.dtype) -> Path:
    rounded = {key: tensor.to(dtype).contiguous().clone() for key, tensor in tensors.items()}
    overflown = [key for key, tensor in rounded.items() if not tensor.isfinite().all()]
    if overflown:
        raise ValueError(f"{overflown[0]} does not fit into {dtype}, the precision of the files read")
    write_atomically(path, lambda temporary: save_file(rounded, temporary, {"format": "pt", **header}))
    return path


def _agreed(sources: Sequence[Foreign]) -> dict[str, str]:
    shared = set.intersection(*(set(source.header.items()) for source in sources))
    return {key: value for key, value in sorted(shared) if not key.startswith(_STALE)}


def _kohya(layer: Layer) -> Iterator[tuple[str, Tensor]]:
    tensors, bias = layer.form.tensors, layer.form.tensors.get("bias")
    if len(layer.shape) == 1:
        yield "w_norm", tensors["weight"] if "weight" in tensors else torch.zeros(layer.shape)
        yield "b_norm", torch.zeros(layer.shape) if bias is None else bias
        return
    if layer.form.form == "lora":
        down, up = _shaped(LowRank(tensors["up"], tensors["down"]), layer.shape)
        yield "lora_down.weight", down
        yield "lora_up.weight", up
        yield "alpha", torch.tensor(float(len(down)))
    elif layer.form.form == "dense":
        yield "diff", tensors["weight"].reshape(layer.shape)
    if bias is not None:
        yield "diff_b", bias


def _diffusers(layers: Sequence[Layer]) -> Iterator[tuple[str, Tensor]]:
    with_bias = {_component(layer)[0] for layer in layers if "bias" in layer.form.tensors}
    for layer in layers:
        component = _component(layer)[0]
        down_key, up_key = factor_keys(component)
        name = current_name(layer.name)
        yield from _factors(layer, f"{name}.{down_key}", f"{name}.{up_key}", component in with_bias)


def _peft(layers: Sequence[Layer]) -> Iterator[tuple[str, Tensor]]:
    with_bias = any("bias" in layer.form.tensors for layer in layers)
    for layer in layers:
        name = peft.PREFIX + layer.name
        yield from _factors(layer, f"{name}.lora_A", f"{name}.lora_B", with_bias)


def _factors(layer: Layer, down_key: str, up_key: str, with_bias: bool) -> Iterator[tuple[str, Tensor]]:
    down, up = _shaped(_low_rank(layer), layer.shape)
    yield f"{down_key}.weight", down
    yield f"{up_key}.weight", up
    if with_bias:
        bias = layer.form.tensors.get("bias")
        yield f"{up_key}.bias", torch.zeros(layer.shape[0]) if bias is None else bias


def _diffusers_config(layers: Sequence[Layer]) -> str:
    """Of every model; without it, ranks that differ are scaled wrong."""
    config: dict[str, object] = {}
    for component in dict.fromkeys(_component(layer)[0] for layer in layers):
        own = [layer for layer in layers if _component(layer)[0] == component]
        ranks = {_component(layer)[1].removeprefix("text_model."): _rank(layer) for layer in own}
        bias = any("bias" in layer.form.tensors for layer in own)
        config |= component_config(component, ranks, dora=False, bias=bias)
    return json.dumps(config, sort_keys=True)


def _component(layer: Layer) -> tuple[str, str]:
    component, _, path = current_name(layer.name).partition(".")
    if not has_loader(component):
        raise ValueError(
            f"{layer.name} does not begin with one of {', '.join(DENOISERS)}, text_encoder; give --base"
        )
    return component, path


def _peft_config(layers: Sequence[Layer], source: Path) -> str:
    before = json.loads(source.read_text(encoding="utf-8"))
    ranks = {layer.name: _rank(layer) for layer in layers}
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != common}
    config = {key: before.get(key) for key in ("task_type", "base_model_name_or_path", "auto_mapping")}
    config |= {"peft_type": "LORA", "r": common, "lora_alpha": common, "target_modules": list(ranks)}
    config |= {"rank_pattern": others, "alpha_pattern": others, "bias": "none", "inference_mode": True}
    config["lora_bias"] = any("bias" in layer.form.tensors for layer in layers)
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _low_rank(layer: Layer) -> LowRank:
    tensors, rows = layer.form.tensors, layer.shape[0]
    if layer.form.form == "lora":
        return LowRank(tensors["up"], tensors["down"])
    if layer.form.form == "dense":
        return full_rank(tensors["weight"].reshape(rows, -1))
    return nothing(rows, torch.Size(layer.shape[1:]).numel())


def _rank(layer: Layer) -> int:
    return _low_rank(layer).up.shape[1]


def _shaped(factors: LowRank, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """``down`` and ``up`` as weights of a layer and of one of kernel size 1 after it."""
    rank, ones = factors.up.shape[1], (1,) * (len(shape) - 2)
    return factors.down.reshape(rank, *shape[1:]), factors.up.reshape(shape[0], rank, *ones)
