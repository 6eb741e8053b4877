"""Which layers an adapter changes: presets and globs, resolved to named layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from diffadapt.adapters.fused_projections import check_not_fused
from diffadapt.adapters.layers import ADAPTED, ORIGINAL
from diffadapt.common.messages import did_you_mean
from diffadapt.methods.site import LayerKind, Site, is_class_table

_PROJECTIONS = {
    "qv": ("to_q", "to_v", "q_proj", "v_proj", "query", "value", "proj_q", "proj_v"),
    "rest": (
        "to_k",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "k_proj",
        "out_proj",
    ),
    "other": ("to_qkv", "qkv", "key", "proj_attn", "proj_k"),
}
_PLAIN_TYPES = (nn.Parameter, Tensor)
_PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CONV_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM_TYPES = (nn.LayerNorm, nn.GroupNorm)

PRESETS = {
    "attention": "query, key, value and output projections",
    "qv": "query and value projections",
    "linear": "every Linear layer",
    "conv": "every convolution",
    "norm": "every LayerNorm and GroupNorm with weights",
    "embedding": "every embedding table",
    "class_embedding": "tables of class embeddings",
    "all": "every Linear layer and convolution",
}


@dataclass(frozen=True)
class TargetSite:
    """A layer chosen by targets, all layers that share its weight, and whether a glob named it on purpose."""

    site: Site
    layers: tuple[nn.Module, ...]
    by_name: bool


def find_sites(
    model: nn.Module,
    targets: str | Sequence[str],
    prefix: str = "",
    *,
    extra_presets: Sequence[str] = (),
    family_presets: Mapping[str, Sequence[str]] | None = None,
) -> list[TargetSite]:
    """The layers of ``model`` that ``targets`` choose, in the model's order; a shared weight is one site.

    ``targets`` are presets or globs on module names, joined with ``+`` or as a sequence; ``!glob`` excludes.
    A name without wildcards matches also as the end of another.

    Args:
        extra_presets: added where they match.
        family_presets: preset -> globs, in place of the general rule of that preset.
    Raises: ValueError for a target that matches nothing, TypeError for a layer that cannot be adapted.
    """
    family_presets = family_presets or {}
    presets = dict.fromkeys((*PRESETS, *family_presets))
    tokens = _tokens(targets)
    layers = dict(layers_with_weight(model))
    chosen: dict[str, bool] = {}
    for token in (*tokens, *extra_presets):
        if token.startswith("!"):
            continue
        matched = [name for name, layer in layers.items() if _matches(token, name, layer, family_presets)]
        if not matched and token in tokens:
            others = [name for name in (*presets, *layers) if name != token]
            raise ValueError(f"target {token!r} matches no layer{did_you_mean(token, others)}")
        for name in matched:
            chosen[name] = chosen.get(name, False) or token not in presets
    for token in tokens:
        if token.startswith("!"):
            excluded = [name for name in layers if name_matches(token[1:], name)]
            if not excluded:
                raise ValueError(f"exclusion {token!r} matches no layer{did_you_mean(token[1:], layers)}")
            for name in excluded:
                chosen.pop(name, None)
    return sites_by_name(model, chosen, prefix)


def sites_by_name(model: nn.Module, names: Mapping[str, bool], prefix: str = "") -> list[TargetSite]:
    """The layers of ``model`` with these names, in the model's order; layers sharing a weight are one site.

    ``names`` says for each whether it was named on purpose. Raises ValueError for a name that is not there.
    """
    layers = dict(layers_with_weight(model))
    for name in names:
        if name not in layers:
            raise ValueError(f"the model has no layer {name!r} with a weight{did_you_mean(name, layers)}")
    shared: dict[int, list[nn.Module]] = {}
    for layer in layers.values():
        shared.setdefault(id(layer.weight), []).append(layer)
    found: dict[int, TargetSite] = {}
    for name, layer in layers.items():
        if name in names and id(layer.weight) not in found:
            check_not_fused(model, name)
            same = shared[id(layer.weight)]
            site = site_of_layer(prefix + name, layer)
            if any(_kind(other) != site.kind for other in same):
                raise TypeError(
                    f"{name} shares its weight with a layer of another kind; exclude it with '!{name}'"
                )
            found[id(layer.weight)] = TargetSite(site, tuple(same), names[name])
    return list(found.values())


def site_of_layer(name: str, layer: nn.Module) -> Site:
    """The site of a layer. Raises TypeError for an unknown exact type, ValueError for a hooked forward."""
    if type(layer) not in ADAPTED and type(layer) not in ORIGINAL:
        raise TypeError(
            f"{name} is a {type(layer).__module__}.{type(layer).__qualname__}, which cannot be adapted; "
            f"exclude it with the target '!{name}' (supported: {', '.join(cls.__name__ for cls in ADAPTED)})"
        )
    if "forward" in layer.__dict__ or hasattr(layer, "_hf_hook"):
        raise ValueError(
            f"{name}: its forward is overridden by a hook, so an adapter would have no effect; "
            "attach before offloading or dispatching the model"
        )
    for key in ("weight", "bias"):
        _check_plain(f"{name}.{key}", getattr(layer, key, None))
    groups = layer.groups if isinstance(layer, _CONV_TYPES) else 1
    # of an adapted layer the base: a merged class table may have other rows
    layer_state = getattr(layer, "_diffadapt", None)
    shape = tuple((layer.weight if layer_state is None else layer_state.base()).shape)
    return Site(name, _kind(layer), shape, groups, getattr(layer, "bias", None) is not None)


def _check_plain(name: str, tensor: Tensor | None) -> None:
    """Raises TypeError for a tensor that is quantised, cast for storage or otherwise no plain float."""
    if tensor is None or (type(tensor) in _PLAIN_TYPES and tensor.dtype in _PLAIN_DTYPES):
        return
    raise TypeError(
        f"{name} is a {type(tensor).__qualname__} of {tensor.dtype}, no plain tensor of float16, bfloat16, "
        "float32 or float64: quantised weights, and weights cast for storage, cannot be adapted; load "
        "the base in bfloat16 or float32"
    )


def assign_ranks(sites: Sequence[Site], patterns: Mapping[str, int]) -> dict[str, int]:
    """The rank of every site a pattern names; the last matching pattern wins."""
    ranks: dict[str, int] = {}
    for pattern, rank in patterns.items():
        matched = [site.name for site in sites if name_matches(pattern, site.name)]
        if not matched:
            raise ValueError(
                f"rank pattern {pattern!r} matches no site{did_you_mean(pattern, [s.name for s in sites])}"
            )
        ranks.update(dict.fromkeys(matched, rank))
    return ranks


def _tokens(targets: str | Sequence[str]) -> list[str]:
    parts = targets.split("+") if isinstance(targets, str) else list(targets)
    tokens = [part.strip() for part in parts if part.strip()]
    if not any(not token.startswith("!") for token in tokens):
        raise ValueError(
            f"targets {targets!r} choose nothing; presets: {', '.join(PRESETS)}, or globs on module names"
        )
    return tokens


def layers_with_weight(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer that holds a weight of its own, whether it can be adapted or not."""
    for name, layer in model.named_modules():
        if isinstance(getattr(layer, "weight", None), nn.Parameter):
            yield name, layer


def _kind(layer: nn.Module) -> LayerKind | None:
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, _CONV_TYPES):
        return "conv"
    if isinstance(layer, nn.Embedding):
        return "embedding"
    return "norm" if isinstance(layer, _NORM_TYPES) else None


def _matches(token: str, name: str, layer: nn.Module, family_presets: Mapping[str, Sequence[str]]) -> bool:
    kind = _kind(layer)
    if token in family_presets:
        is_product = kind in ("linear", "conv")
        return is_product and any(name_matches(pattern, name) for pattern in family_presets[token])
    if token == "all":
        return kind in ("linear", "conv")
    if token in ("linear", "conv", "norm", "embedding"):
        return kind == token
    if token == "class_embedding":
        return kind == "embedding" and is_class_table(name)
    if token in ("attention", "qv"):
        names = _PROJECTIONS["qv"] if token == "qv" else sum(_PROJECTIONS.values(), ())
        return kind in ("linear", "conv") and any(name == leaf or name.endswith("." + leaf) for leaf in names)
    return name_matches(token, name)


def name_matches(pattern: str, name: str) -> bool:
    """Whether a glob matches a layer's name; without wildcards it matches the end of a name, too."""
    return fnmatchcase(name, pattern) or (not set(pattern) & set("*?[") and name.endswith("." + pattern))
