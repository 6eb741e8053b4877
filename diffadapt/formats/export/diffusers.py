"""Files for `load_lora_weights` of stock diffusers: PEFT's LoRA, with magnitudes where rows are scaled."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.attach import pipeline_of
from diffadapt.algebra.low_rank import LowRank, full_rank_factors, truncated_svd, zero_factors
from diffadapt.common.messages import shorten_list
from diffadapt.common.pipeline_components import DENOISERS, is_text_encoder
from diffadapt.formats.emulators.peft import geometry_refusal
from diffadapt.formats.export.class_rows import check_no_new_rows
from diffadapt.formats.export.exported_layer import ExportedLayer, factor_weights
from diffadapt.formats.export.layer_names import clip_path
from diffadapt.formats.export.target import ExportJob, ExportTarget, save_tensors
from diffadapt.formats.export.verify import Verdict, verify_diffusers

# share of the values of all adapted weights: so few dense ones are written as factors of full rank
_FULL_RANK_SHARE = 0.25


def loader_refusal(adapter: Adapter) -> str:
    """Why diffusers opens no file of an adapter, whatever its keys; empty where it does."""
    pipeline = pipeline_of(adapter)
    if pipeline is not None:
        if not hasattr(pipeline, "load_lora_weights"):
            return f"diffusers has no load_lora_weights for {type(pipeline).__name__}"
        return _component_refusal(adapter, pipeline)
    for name, model in adapter.roots.items():
        is_denoiser = not is_text_encoder(name)  # pipelines load those of their text encoders
        if is_denoiser and hasattr(model, "config") and not hasattr(model, "load_lora_adapter"):
            return f"diffusers has no load_lora_adapter for {type(model).__name__}"
    return ""


def check_loader(adapter: Adapter) -> None:
    """Raises ValueError where diffusers opens no file of an adapter."""
    refusal = loader_refusal(adapter)
    if refusal:
        raise ValueError(f"{refusal}, so nothing could open the file; use --to merged")


def has_loader(component: str) -> bool:
    """Whether LoRA files of diffusers hold layers of a component of that name."""
    return component in DENOISERS or is_text_encoder(component)


def low_rank_layers(layers: Sequence[ExportedLayer], rank: int | None) -> list[ExportedLayer]:
    """The layers with changes that PEFT's LoRA holds: in factors, and without row scales where biases change.

    Args:
        rank: of the SVD that replaces changes without structure; None for full rank, where these are few.

    Raises:
        ValueError: layers cannot be held; the message names them and the reason.
    """
    _check_layers(layers)
    components_with_bias = _components_with_bias(layers)
    without_scales = []
    for layer in layers:
        if layer.scale is not None and layer.component in components_with_bias:
            layer = layer.as_dense()  # PEFT has no DoRA beside lora_bias
        without_scales.append(layer)
    dense = [layer for layer in without_scales if layer.is_dense]
    if rank is None:
        if _num_values(dense) > _FULL_RANK_SHARE * _num_values(layers):
            raise ValueError(
                f"{_names(dense)}: the change is no product of thin matrices, all that diffusers loads; "
                "give --rank N for its nearest one of rank N, whose error is printed, or use --to merged"
            )
        rank = max((min(layer.matrix_shape) for layer in dense), default=1)  # full, whatever the layer
    low_rank = []
    for layer in without_scales:
        low_rank.append(_cut_to_rank(layer, rank) if layer.is_dense else layer)
    return low_rank


def diffusers_tensors(layers: Sequence[ExportedLayer]) -> Iterator[tuple[str, Tensor]]:
    """The file's keys and tensors, float64, layer by layer.

    Args:
        layers: as `low_rank_layers` returns them.
    """
    # PEFT's options hold for a whole model: all its layers have a bias and a magnitude, or none has
    components_with_bias = _components_with_bias(layers)
    components_with_scale = {layer.component for layer in layers if layer.scale is not None}
    for layer in layers:
        name = f"{layer.component}.{clip_path(layer.component, layer.path)}"
        down_key, up_key = factor_keys(layer.component)
        down, up = factor_weights(_low_rank(layer), layer.shape)
        yield f"{name}.{down_key}.weight", down
        yield f"{name}.{up_key}.weight", up
        if layer.component in components_with_bias:
            yield f"{name}.{up_key}.bias", up.new_zeros(len(up)) if layer.bias is None else layer.bias
        if layer.component in components_with_scale:
            yield f"{name}.{_magnitude_key(layer.component)}", _magnitude(layer)


def adapter_config(layers: Sequence[ExportedLayer]) -> str:
    """PEFT's configuration of every model, as JSON.

    diffusers from 0.34 on prefers it to guessing from the keys, and versions that guess scale layers of a
    rank unlike the others' wrong.
    """
    by_component: dict[str, list[ExportedLayer]] = {}
    for layer in layers:
        by_component.setdefault(layer.component, []).append(layer)
    config: dict[str, object] = {}
    for component, component_layers in by_component.items():
        ranks = {}
        has_scale = has_bias = False
        for layer in component_layers:
            ranks[layer.path.removeprefix("text_model.")] = _rank(layer)
            has_scale |= layer.scale is not None
            has_bias |= layer.bias is not None
        config |= component_config(component, ranks, dora=has_scale, bias=has_bias)
    return json.dumps(config, sort_keys=True)


def component_config(
    component: str, ranks: Mapping[str, int], *, dora: bool, bias: bool
) -> dict[str, object]:
    """PEFT's configuration of one model, given the rank of every layer by its path; alpha is the rank."""
    common_rank = Counter(ranks.values()).most_common(1)[0][0]  # keeps the patterns short
    other_ranks = {}
    for path, rank in ranks.items():
        if rank != common_rank:
            # A pattern also matches as the end of a name: Flux's proj_out, that of every single block.
            is_end_of_another = any(other.endswith(f".{path}") for other in ranks)
            other_ranks[f"^{path}" if is_end_of_another else path] = rank
    return {
        f"{component}.r": common_rank,
        f"{component}.lora_alpha": common_rank,
        f"{component}.rank_pattern": other_ranks,
        f"{component}.alpha_pattern": other_ranks,
        f"{component}.target_modules": list(ranks),
        f"{component}.use_dora": dora,
        f"{component}.lora_bias": bias,
    }


def factor_keys(component: str) -> tuple[str, str]:
    """The names of the factors `down` and `up` in the file."""
    # under PEFT's names diffusers does not load a text encoder whose attention is unchanged
    if is_text_encoder(component):
        return "lora_linear_layer.down", "lora_linear_layer.up"
    return "lora_A", "lora_B"


def _components_with_bias(layers: Sequence[ExportedLayer]) -> set[str]:
    """The models of which a layer's bias changes."""
    return {layer.component for layer in layers if layer.bias is not None}


def _num_values(layers: Sequence[ExportedLayer]) -> int:
    return sum(layer.shape.numel() for layer in layers)


def _component_refusal(adapter: Adapter, pipeline: object) -> str:
    """Names an adapted component that the pipeline's `load_lora_weights` passes over; empty without one."""
    loadable = getattr(pipeline, "_lora_loadable_modules", None)
    if loadable is None:  # a pipeline from outside of diffusers
        return ""
    for site in adapter.sites:
        component = site.name.partition(".")[0]
        if component in adapter.roots and component not in loadable:
            return (
                f"{site.name}: load_lora_weights of {type(pipeline).__name__} loads files into "
                f"{' and '.join(loadable)} only"
            )
    return ""


def _magnitude_key(component: str) -> str:
    # transformers 5 puts the adapter's name before the last word, and finds no other spelling
    return "lora_magnitude_vector.weight" if is_text_encoder(component) else "lora_magnitude_vector"


def _cut_to_rank(layer: ExportedLayer, rank: int) -> ExportedLayer:
    """A dense change as factors: with the identity where the rank suffices, else its nearest."""
    matrix = layer.form.matrix()
    if rank >= min(matrix.shape):
        return layer.with_factors(full_rank_factors(matrix), is_approximated=False)
    return layer.with_factors(truncated_svd(matrix, rank), is_approximated=True)


def _low_rank(layer: ExportedLayer) -> LowRank:
    return zero_factors(*layer.matrix_shape) if layer.factors is None else layer.factors.as_product()


def _rank(layer: ExportedLayer) -> int:
    return _low_rank(layer).up.shape[1]


def _magnitude(layer: ExportedLayer) -> Tensor:
    """PEFT computes `magnitude * V / |V|` by rows, `V = W + up down`: for `scale * V` it is `scale * |V|`."""
    changed = layer.weight.flatten(1)  # V (out, fan_in)
    if layer.factors is not None:
        changed = changed + layer.factors.matrix()
    magnitude = changed.norm(dim=1)  # (out,)
    if layer.scale is not None:
        magnitude = layer.scale * magnitude
    if layer.kind == "linear":
        return magnitude
    # PEFT's magnitude of a convolution has the channels second, as its output has
    return magnitude.reshape(1, -1, *(1,) * (len(layer.shape) - 2))  # (1, out, 1, ...)


def _check_layers(layers: Sequence[ExportedLayer]) -> None:
    for layer in layers:
        if not has_loader(layer.component):
            raise ValueError(
                f"{layer.name}: diffusers loads LoRA files into pipelines with a unet or transformer; "
                "use --to merged"
            )
        reason = geometry_refusal(layer.layer)
        if reason:
            raise ValueError(f"{layer.name}: {reason}; use --to merged")
    unsupported = []
    kinds = set()
    for layer in layers:
        if layer.kind not in ("linear", "conv"):
            unsupported.append(layer)
            kinds.add(f"{layer.kind}s")
    if unsupported:
        listed = " and ".join(sorted(kinds))
        raise ValueError(
            f"{_names(unsupported)}: diffusers has no file for changed {listed}; use --to merged"
        )


def _names(layers: Sequence[ExportedLayer]) -> str:
    return shorten_list([layer.name for layer in layers], limit=3)


def _fit(job: ExportJob) -> Sequence[ExportedLayer]:
    check_no_new_rows(job.layers, "diffusers")
    check_loader(job.adapter)
    return low_rank_layers(job.layers, job.rank)


def _write(job: ExportJob, path: Path) -> None:
    save_tensors(diffusers_tensors(job.layers), path, job.dtype)


def _verify(job: ExportJob, path: Path) -> list[Verdict]:
    return verify_diffusers(str(path), job.layers, job.dtype)


def _header(job: ExportJob) -> dict[str, str]:
    return {"lora_adapter_metadata": adapter_config(job.layers)}


DIFFUSERS = ExportTarget(
    name="diffusers",
    ending="_diffusers.safetensors",
    meant_for=("diffusers",),
    fit=_fit,
    write=_write,
    verify=_verify,
    header=_header,
    takes_rank=True,
)
