"""Files for ComfyUI: with kohya's key names, which stable-diffusion-webui and LyCORIS read too; for
transformers with diffusers' names, so that `load_lora_weights` opens the same file.

Every multiplier is folded into the factors, and `alpha` equals the rank, so that no program scales anything.
With diffusers' names there is no `alpha`: its loaders for Qwen-Image and Z-Image take a file with one for
another format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from diffadapt.adapters.architectures import Architecture
from diffadapt.algebra.full_rank import Dense, Kron, LowRankHadamard
from diffadapt.algebra.low_rank import LowRank, Tucker, full_rank_factors, zero_factors
from diffadapt.formats.emulators.lycoris import split_read_from
from diffadapt.formats.export.checks import check_no_new_biases
from diffadapt.formats.export.class_rows import check_no_new_rows
from diffadapt.formats.export.diffusers import (
    adapter_config,
    diffusers_tensors,
    factor_keys,
    loader_refusal,
)
from diffadapt.formats.export.exported_layer import ExportedLayer, factor_weights, per_row
from diffadapt.formats.export.layer_names import base_architecture, has_diffusers_names, kohya_name
from diffadapt.formats.export.target import ExportJob, ExportTarget, save_tensors
from diffadapt.formats.export.verify import Verdict, verify_kohya
from diffadapt.formats.export.verify_transformer import verify_transformer

# ComfyUI adds float32's epsilon to the norm it divides by (comfy/weight_adapter/base.py, 0.3.77)
_COMFYUI_EPSILON = torch.finfo(torch.float32).eps


def kohya_tensors(
    layers: Sequence[ExportedLayer], base: Architecture, *, dense: bool
) -> Iterator[tuple[str, Tensor]]:
    """The file's keys and tensors, float64, one layer after the other.

    Args:
        dense: write whole differences where the compact keys are right in ComfyUI alone: for scaled rows, and
            for biases of layers whose weight stays.

    Raises:
        ValueError: a layer has no name there.
    """
    if has_diffusers_names(base):
        yield from _transformer_tensors(layers, base, dense)
        return
    for layer in layers:
        name = kohya_name(layer.component, layer.path, base)
        for key, tensor in _layer_tensors(layer, dense).items():
            yield f"{name}.{key}", tensor


def is_thin(layers: Sequence[ExportedLayer], *, dense: bool) -> bool:
    """Whether diffusers' keys, with magnitudes where rows are scaled, hold all changes in their own form."""
    return all(
        layer.kind in ("linear", "conv")
        and layer.bias is None
        and not layer.is_dense
        and not (dense and layer.scale is not None)
        and isinstance(layer.factors, (LowRank, Tucker, type(None)))
        for layer in layers
    )


def _transformer_tensors(
    layers: Sequence[ExportedLayer], base: Architecture, dense: bool
) -> Iterator[tuple[str, Tensor]]:
    """Keys with the names of diffusers; those of diffusers alone where they hold every change.

    Rows are scaled by `dora_scale` in ComfyUI, and by PEFT's magnitudes in diffusers: each passes over the
    other's key.
    """
    if is_thin(layers, dense=dense):
        yield from diffusers_tensors(layers)
        for layer in layers:
            if layer.scale is not None:
                name = kohya_name(layer.component, layer.path, base)
                yield f"{name}.dora_scale", _comfyui_magnitude(layer)
        return
    for layer in layers:
        name = kohya_name(layer.component, layer.path, base)
        down_key, up_key = factor_keys(layer.component)
        ends = {"lora_down.weight": f"{down_key}.weight", "lora_up.weight": f"{up_key}.weight"}
        for key, tensor in _layer_tensors(_without_tucker(layer), dense).items():
            if key != "alpha":
                yield f"{name}.{ends.get(key, key)}", tensor


def _without_tucker(layer: ExportedLayer) -> ExportedLayer:
    """The layer with a product of two factors in place of three, which have no keys beside diffusers'."""
    if not isinstance(layer.factors, Tucker):
        return layer
    return layer.with_factors(layer.factors.as_product(), is_approximated=layer.is_approximated)


def _layer_tensors(layer: ExportedLayer, dense: bool) -> dict[str, Tensor]:
    if layer.kind == "norm":  # A1111 takes both keys or none
        difference = layer.adapted - layer.weight
        if layer.base_bias is None:  # an RMSNorm
            return {"w_norm": difference}
        bias = torch.zeros_like(difference) if layer.bias is None else layer.bias
        return {"w_norm": difference, "b_norm": bias}
    has_scale = layer.scale is not None
    has_bias = layer.bias is not None
    # whole differences are what every program reads in the same way
    if (dense and (has_scale or has_bias)) or (has_scale and has_bias):
        tensors = {"diff": layer.expected_weight() - layer.weight}
    else:
        tensors = _weight_tensors(layer)
        if has_scale:
            tensors["dora_scale"] = _comfyui_magnitude(layer)
    if has_bias:
        tensors["diff_b"] = layer.bias
    return tensors


def _comfyui_magnitude(layer: ExportedLayer) -> Tensor:
    """The `dora_scale` for which ComfyUI computes `scale * (W + form)`, at every strength.

    DoRA divides by the norm of the changed weight, ComfyUI by `|W| + epsilon`: what it multiplies with has
    that as a factor.
    """
    norm = layer.weight.flatten(1).norm(dim=1)  # (out,)
    return per_row(layer.scale * (norm + _COMFYUI_EPSILON), layer.weight)


def _weight_tensors(layer: ExportedLayer) -> dict[str, Tensor]:
    """The keys of the weight's change in the most compact form."""
    form = layer.form
    if form is None and layer.scale is None:
        return {}
    if form is None:  # a row scale needs a weight change beside it
        form = zero_factors(*layer.matrix_shape)
    if form.is_dense and layer.scale is not None:
        # ComfyUI reads no whole difference with a row scale: the identity is its other factor
        form = full_rank_factors(form.matrix())
    return _WRITERS[type(form)](form, layer)


def _lora_tensors(form: LowRank, layer: ExportedLayer) -> dict[str, Tensor]:
    down, up = factor_weights(form, layer.shape)
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": _alpha(len(down))}


def _tucker_tensors(form: Tucker, layer: ExportedLayer) -> dict[str, Tensor]:
    """LoCon's Tucker keys. ComfyUI and LyCORIS take a core of equal sides only: zeros fill it up."""
    if all(size == 1 for size in layer.shape[2:]):  # the programs know no core without a kernel
        return _lora_tensors(form.as_product(), layer)
    r_out, r_in, *kernel = form.core.shape
    side = max(r_out, r_in)
    ones = (1,) * len(kernel)
    no_padding = (0, 0) * len(kernel)
    core = F.pad(form.core, (*no_padding, 0, side - r_in, 0, side - r_out))  # (side, side, *kernel)
    down = F.pad(form.down, (0, 0, 0, side - r_in))  # (side, in / groups)
    up = F.pad(form.up, (0, side - r_out))  # (out, side)
    return {
        "lora_down.weight": down.reshape(side, -1, *ones),
        "lora_mid.weight": core,
        "lora_up.weight": up.reshape(-1, side, *ones),
        "alpha": _alpha(side),
    }


def _loha_tensors(form: LowRankHadamard, layer: ExportedLayer) -> dict[str, Tensor]:
    return {
        "hada_w1_a": form.first.up,  # (out, r)
        "hada_w1_b": form.first.down,  # (r, fan_in)
        "hada_w2_a": form.second.up,
        "hada_w2_b": form.second.down,
        "alpha": _alpha(form.first.up.shape[1]),
    }


def _lokr_tensors(form: Kron, layer: ExportedLayer) -> dict[str, Tensor]:
    """LoKr keys, where LyCORIS guesses the split they were made with from their shapes; else plain ones."""
    rows, columns = form.first.shape
    out, channels, *kernel = layer.shape
    block = (out // rows, channels // columns)  # the second factor without its kernel
    kernel_size = math.prod(kernel)
    if rows * block[0] == out and columns * block[1] == channels:  # no split goes through the kernel
        if not form.second.is_dense:
            rank = form.second.up.shape[1]
            if split_read_from((rows, columns), block, rank, kernel_size):
                return {
                    "lokr_w1": form.first,
                    "lokr_w2_a": form.second.up,
                    "lokr_w2_b": form.second.down,
                    "alpha": _alpha(rank),
                }
        if split_read_from((rows, columns), block, None, kernel_size):
            second = form.second.matrix().reshape(*block, *kernel)
            return {"lokr_w1": form.first, "lokr_w2": second, "alpha": _alpha(1)}
    # the rank of a Kronecker product is the product of its factors' ranks
    product = form.as_product()
    if product.up.shape[1] < min(layer.matrix_shape) or layer.scale is not None:
        return _lora_tensors(product, layer)
    return {"diff": form.matrix().reshape(layer.shape)}


def _dense_tensors(form: Dense, layer: ExportedLayer) -> dict[str, Tensor]:
    return {"diff": form.matrix().reshape(layer.shape)}


def _alpha(rank: int) -> Tensor:
    return torch.tensor(float(rank), dtype=torch.float64)


_WRITERS = {
    LowRank: _lora_tensors,
    Tucker: _tucker_tensors,
    LowRankHadamard: _loha_tensors,
    Kron: _lokr_tensors,
    Dense: _dense_tensors,
}


def _fit(job: ExportJob) -> Sequence[ExportedLayer]:
    """Raises ValueError for changes without a key, and for layers without a name."""
    if not job.force:
        check_no_new_biases(job.layers, "kohya")
    check_no_new_rows(job.layers, "kohya")
    base = base_architecture(job.adapter)
    for layer in job.layers:
        kohya_name(layer.component, layer.path, base)
    return job.layers


def _write(job: ExportJob, path: Path) -> None:
    tensors = kohya_tensors(job.layers, base_architecture(job.adapter), dense=job.dense)
    save_tensors(tensors, path, job.dtype)


def _verify(job: ExportJob, path: Path) -> list[Verdict]:
    base = base_architecture(job.adapter)
    if has_diffusers_names(base):
        return verify_transformer(str(path), job.layers, base, job.dtype, loader_refusal(job.adapter))
    return verify_kohya(str(path), job.layers, base, job.dtype)


def _header(job: ExportJob) -> dict[str, str]:
    if not has_diffusers_names(base_architecture(job.adapter)) or not is_thin(job.layers, dense=job.dense):
        return {}
    return {"lora_adapter_metadata": adapter_config(job.layers)}


KOHYA = ExportTarget(
    name="kohya",
    ending="_comfyui.safetensors",
    meant_for=("ComfyUI",),
    fit=_fit,
    write=_write,
    verify=_verify,
    header=_header,
)
