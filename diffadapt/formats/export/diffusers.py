"""Files for ``load_lora_weights`` of stock diffusers: PEFT's LoRA, with magnitudes where rows are scaled."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping

from torch import Tensor

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.attach import pipeline_of
from diffadapt.algebra.low_rank import LowRank
from diffadapt.common.messages import shorten_list
from diffadapt.common.pipeline_components import DENOISERS, is_text_encoder
from diffadapt.formats.emulators.peft import geometry_refusal
from diffadapt.formats.export.changes import Change
from diffadapt.formats.export.export_form import factor_weights, full_rank, low_rank, nearest, nothing
from diffadapt.formats.export.layer_names import clip_path

_FULL_RANK_SHARE = 0.25  # of the adapted weights: few enough to be written whole, as factors of full rank


def check_loader(adapter: Adapter) -> None:
    """Raises ValueError where diffusers has no loader for the pipeline, or for a lone model."""
    pipeline = pipeline_of(adapter)
    if pipeline is not None:
        if not hasattr(pipeline, "load_lora_weights"):
            raise ValueError(
                f"diffusers has no load_lora_weights for {type(pipeline).__name__}, so nothing could open "
                "the file; use --to merged"
            )
        _check_components(adapter, pipeline)
        return
    for name, model in adapter.roots.items():
        is_denoiser = not is_text_encoder(name)  # pipelines load those of their text encoders
        if is_denoiser and hasattr(model, "config") and not hasattr(model, "load_lora_adapter"):
            raise ValueError(
                f"diffusers has no load_lora_adapter for {type(model).__name__}, so nothing could open "
                "the file; use --to merged"
            )


def _check_components(adapter: Adapter, pipeline: object) -> None:
    """Raises ValueError for an adapted component that the pipeline's `load_lora_weights` passes over."""
    loadable = getattr(pipeline, "_lora_loadable_modules", None)
    if loadable is None:
        return
    for site in adapter.sites:
        component = site.name.partition(".")[0]
        if component in adapter.roots and component not in loadable:
            raise ValueError(
                f"{site.name}: load_lora_weights of {type(pipeline).__name__} loads files into "
                f"{' and '.join(loadable)} only; use --to merged"
            )


def has_loader(component: str) -> bool:
    """Whether LoRA files of diffusers hold layers of a component of that name."""
    return component in DENOISERS or is_text_encoder(component)


def diffusers_changes(changes: list[Change], rank: int | None) -> list[Change]:
    """The changes in forms that PEFT's LoRA holds: every form low rank, and rows scaled only where no bias of
    the same model changes.

    Args:
        rank: of the SVD that replaces changes without structure.
    Raises: ValueError naming the layers and the reason where one cannot be held.
    """
    _check_layers(changes)
    with_bias = {change.component for change in changes if change.bias is not None}
    held = []
    for change in changes:
        if change.scale is not None and change.component in with_bias:
            change = change.as_whole()  # PEFT has no DoRA beside lora_bias
        held.append(change)
    dense = [change for change in held if change.is_whole]
    if rank is None:
        entries, whole = (sum(change.shape.numel() for change in some) for some in (dense, held))
        if entries > _FULL_RANK_SHARE * whole:
            raise ValueError(
                f"{_listed(dense)}: the change is no product of thin matrices, all that diffusers loads; "
                "give --rank N for its nearest one of rank N, whose error is printed, or use --to merged"
            )
        rank = max((min(change.matrix_shape) for change in dense), default=1)
    return [_thin(change, rank) if change.is_whole else change for change in held]


def diffusers_tensors(changes: list[Change]) -> Iterator[tuple[str, Tensor]]:
    """The file's keys and tensors, float64, layer by layer; takes what ``diffusers_changes`` gives."""
    with_scale = {change.component for change in changes if change.scale is not None}
    with_bias = {change.component for change in changes if change.bias is not None}
    for change in changes:
        name = f"{change.component}.{clip_path(change.component, change.path)}"
        down_key, up_key = factor_keys(change.component)
        down, up = factor_weights(_factors(change), change.shape)
        yield f"{name}.{down_key}.weight", down
        yield f"{name}.{up_key}.weight", up
        if change.component in with_bias:
            bias = up.new_zeros(len(up)) if change.bias is None else change.bias
            yield f"{name}.{up_key}.bias", bias
        if change.component in with_scale:
            yield f"{name}.{_magnitude_key(change.component)}", _magnitude(change)


def adapter_config(changes: list[Change]) -> str:
    """PEFT's configuration of every model, as JSON: diffusers from 0.34 on prefers it to guessing from the
    keys, and versions that guess scale layers of a rank unlike the others' wrong."""
    config: dict[str, object] = {}
    for component in dict.fromkeys(change.component for change in changes):
        own = [change for change in changes if change.component == component]
        ranks = {change.path.removeprefix("text_model."): _rank(change) for change in own}
        dora = any(change.scale is not None for change in own)
        bias = any(change.bias is not None for change in own)
        config |= component_config(component, ranks, dora=dora, bias=bias)
    return json.dumps(config, sort_keys=True)


def component_config(
    component: str, ranks: Mapping[str, int], *, dora: bool, bias: bool
) -> dict[str, object]:
    """PEFT's configuration of one model, given the rank of every layer; alpha is the rank."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: other for path, other in ranks.items() if other != rank}
    return {
        f"{component}.r": rank,
        f"{component}.lora_alpha": rank,
        f"{component}.rank_pattern": others,
        f"{component}.alpha_pattern": others,
        f"{component}.target_modules": list(ranks),
        f"{component}.use_dora": dora,
        f"{component}.lora_bias": bias,
    }


def factor_keys(component: str) -> tuple[str, str]:
    """The names of the factors ``down`` and ``up`` in the file."""
    # under PEFT's names diffusers does not load a text encoder whose attention is unchanged
    if is_text_encoder(component):
        return "lora_linear_layer.down", "lora_linear_layer.up"
    return "lora_A", "lora_B"


def _magnitude_key(component: str) -> str:
    # transformers 5 puts the adapter's name before the last word, and finds no other spelling
    return "lora_magnitude_vector.weight" if is_text_encoder(component) else "lora_magnitude_vector"


def _thin(change: Change, rank: int) -> Change:
    """A whole change as factors: the identity and itself where the rank suffices, else its nearest."""
    matrix = change.form.matrix()
    if rank >= min(matrix.shape):
        return change.factored(full_rank(matrix), approximated=False)
    return change.factored(nearest(matrix, rank), approximated=True)


def _factors(change: Change) -> LowRank:
    return nothing(*change.matrix_shape) if change.factors is None else low_rank(change.factors)


def _rank(change: Change) -> int:
    return _factors(change).up.shape[1]


def _magnitude(change: Change) -> Tensor:
    weight = change.weight.flatten(1)
    norm = (weight if change.factors is None else weight + change.factors.matrix()).norm(dim=1)
    magnitude = norm if change.scale is None else change.scale * norm
    return magnitude if change.kind == "linear" else magnitude.reshape(1, -1, *(1,) * (len(change.shape) - 2))


def _check_layers(changes: list[Change]) -> None:
    for change in changes:
        if not has_loader(change.component):
            raise ValueError(
                f"{change.name}: diffusers loads LoRA files into pipelines with a unet or transformer; "
                "use --to merged"
            )
        reason = geometry_refusal(change.layer)
        if reason:
            raise ValueError(f"{change.name}: {reason}; use --to merged")
    others = [change for change in changes if change.kind not in ("linear", "conv")]
    if others:
        kinds = " and ".join(sorted({f"{change.kind}s" for change in others}))
        raise ValueError(f"{_listed(others)}: diffusers has no file for changed {kinds}; use --to merged")


def _listed(changes: list[Change]) -> str:
    return shorten_list([change.name for change in changes], limit=3)
