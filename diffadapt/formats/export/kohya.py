"""Files with kohya's key names, which ComfyUI, stable-diffusion-webui and LyCORIS read.

Every multiplier is folded into the factors and ``alpha`` equals the rank, so that no program scales anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from diffadapt.adapters.architectures import Architecture
from diffadapt.algebra.full_rank import Dense, Kron, LowRankHadamard
from diffadapt.algebra.low_rank import LowRank, Tucker
from diffadapt.formats.emulators.lycoris import split_read_from
from diffadapt.formats.export.changes import Change, per_row
from diffadapt.formats.export.export_form import factor_weights, full_rank, low_rank, nothing
from diffadapt.formats.export.layer_names import kohya_name

# ComfyUI adds float32's epsilon to the norm it divides by (comfy/weight_adapter/base.py, 0.3.77).
_COMFYUI_EPSILON = torch.finfo(torch.float32).eps


def kohya_tensors(changes: list[Change], base: Architecture, *, dense: bool) -> Iterator[tuple[str, Tensor]]:
    """The file's keys and tensors, float64, one layer after the other.

    ``dense`` writes whole differences where the compact keys are right in ComfyUI alone: scaled rows, and
    biases of layers whose weight stays.
    Raises: ValueError for layers that have no name there.
    """
    for change in changes:
        name = kohya_name(change.component, change.path, base)
        for key, value in _layer_tensors(change, dense).items():
            yield f"{name}.{key}", value


def _layer_tensors(change: Change, dense: bool) -> dict[str, Tensor]:
    if change.kind == "norm":
        difference = change.adapted - change.weight
        bias = torch.zeros_like(difference) if change.bias is None else change.bias
        return {"w_norm": difference, "b_norm": bias}
    if change.bias is not None and (dense or change.scale is not None):
        return {"diff": change.target() - change.weight, "diff_b": change.bias}
    if change.scale is not None and dense:
        return {"diff": change.target() - change.weight}
    tensors = _factors(change)
    if change.scale is not None:
        tensors["dora_scale"] = _comfyui_magnitude(change)
    return tensors if change.bias is None else tensors | {"diff_b": change.bias}


def _comfyui_magnitude(change: Change) -> Tensor:
    """ComfyUI divides by the norm of W where DoRA divides by that of the changed weight. What it multiplies
    with is made so that its result is ``scale * (W + form)``: exact at every strength."""
    weight = change.weight
    return per_row(change.scale * (weight.flatten(1).norm(dim=1) + _COMFYUI_EPSILON), weight)


def _factors(change: Change) -> dict[str, Tensor]:
    form, shape = change.form, change.shape
    if form is None and change.scale is None:
        return {}
    if form is None:  # a row scale needs a weight change beside it
        form = nothing(*change.matrix_shape)
    if isinstance(form, Tucker) and all(size == 1 for size in shape[2:]):
        form = low_rank(form)
    if isinstance(form, LowRank):
        return _lora(form, shape)
    if isinstance(form, Tucker):
        return _tucker(form)
    if isinstance(form, LowRankHadamard):
        return _loha(form)
    if isinstance(form, Kron):
        return _lokr(form, change)
    if change.scale is not None:
        # ComfyUI reads no whole difference with a row scale: the identity is its other factor
        product = full_rank(form.matrix()) if isinstance(form, Dense) else low_rank(form)
        return _lora(product, shape)
    return {"diff": form.matrix().reshape(shape)}


def _lora(form: LowRank, shape: torch.Size) -> dict[str, Tensor]:
    down, up = factor_weights(form, shape)
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": _alpha(len(down))}


def _tucker(form: Tucker) -> dict[str, Tensor]:
    """LoCon's Tucker keys. ComfyUI and LyCORIS take a core of equal sides only: zeros fill it up."""
    r_out, r_in, *kernel = form.core.shape
    side = max(r_out, r_in)
    ones = (1,) * len(kernel)
    core = F.pad(form.core, (*(0, 0) * len(kernel), 0, side - r_in, 0, side - r_out))
    return {
        "lora_down.weight": F.pad(form.down, (0, 0, 0, side - r_in)).reshape(side, -1, *ones),
        "lora_mid.weight": core,
        "lora_up.weight": F.pad(form.up, (0, side - r_out)).reshape(-1, side, *ones),
        "alpha": _alpha(side),
    }


def _loha(form: LowRankHadamard) -> dict[str, Tensor]:
    return {
        "hada_w1_a": form.first.up,
        "hada_w1_b": form.first.down,
        "hada_w2_a": form.second.up,
        "hada_w2_b": form.second.down,
        "alpha": _alpha(form.first.up.shape[1]),
    }


def _lokr(form: Kron, change: Change) -> dict[str, Tensor]:
    """LoKr keys, where LyCORIS guesses the split they were made with from their shapes; else plain ones."""
    (a, b), (out, channels, *kernel) = form.left.shape, change.shape
    block, entries = (out // a, channels // b), math.prod(kernel)
    whole_rows = a * block[0] == out and b * block[1] == channels
    if isinstance(form.right, LowRank) and whole_rows:
        rank = form.right.up.shape[1]
        if split_read_from((a, b), block, rank, entries):
            right = {"lokr_w2_a": form.right.up, "lokr_w2_b": form.right.down}
            return {"lokr_w1": form.left, **right, "alpha": _alpha(rank)}
    if whole_rows and split_read_from((a, b), block, None, entries):
        right = form.right.matrix().reshape(*block, *kernel)
        return {"lokr_w1": form.left, "lokr_w2": right, "alpha": _alpha(1)}
    product = low_rank(form)
    if product.up.shape[1] < min(change.matrix_shape) or change.scale is not None:
        return _lora(product, change.shape)
    return {"diff": form.matrix().reshape(change.shape)}


def _alpha(rank: int) -> Tensor:
    return torch.tensor(float(rank), dtype=torch.float64)
