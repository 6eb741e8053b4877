"""Which layers an adapter changes: presets and globs, resolved to named layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

import torch
from torch import Tensor, nn

from diffadapt.adapters.fused_projections import check_not_fused
from diffadapt.adapters.layers import ADAPTED, can_adapt, is_norm, layer_state_of
from diffadapt.common.messages import did_you_mean, shorten_list
from diffadapt.methods.site import LayerKind, Site, is_class_table

# last names of attention's projections in diffusers, transformers and older models
_QV_PROJECTIONS = ("to_q", "to_v", "q_proj", "v_proj", "query", "value", "proj_q", "proj_v")
_OTHER_PROJECTIONS = (
    "to_k",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "k_proj",
    "out_proj",
    "to_qkv",
    "qkv",
    "key",
    "proj_attn",
    "proj_k",
)
# last names of the layers of feed-forward networks in diffusers, transformers and DiT's own code
_MLP_LAYERS = ("ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2")
_PLAIN_TYPES = (nn.Parameter, Tensor)
_PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_RANGE = re.compile(r"\{(\d{1,9})-(\d{1,9})\}")
_LARGEST_BLOCK = 1000
_CONV_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

PRESETS = {
    "attention": "query, key, value and output projections",
    "qv": "query and value projections",
    "mlp": "layers of the feed-forward networks beside attention",
    "linear": "every Linear layer",
    "conv": "every convolution",
    "norm": "every LayerNorm, GroupNorm and RMSNorm with weights",
    "embedding": "every embedding table",
    "class_embedding": "tables of class embeddings",
    "all": "every Linear layer and convolution",
}


@dataclass(frozen=True)
class TargetSite:
    """A weight chosen by targets.

    Attributes:
        site: the weight and its layer, by name and shapes.
        layers: all layers that share the weight.
        by_name: whether a glob named the layer on purpose, not a preset.
    """

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
    unread_layers: Sequence[str] = (),
) -> list[TargetSite]:
    """Finds the layers that targets choose, in the model's order; a shared weight is one site.

    Args:
        model: the model.
        targets: presets or globs on module names, joined with `+` or as a sequence; `!glob` excludes. A name
            without wildcards also matches as the end of another. In globs, `{4-11}` is every number of a
            range; `attention@blocks.{4-11}` is what the preset chooses below modules that match.
        prefix: what the sites' names begin with, e.g. `unet.`.
        extra_presets: presets that are added where they match.
        family_presets: preset -> globs, in place of the general rule of that preset.
        unread_layers: globs on layers that no output of the model depends on; they are chosen as others are.

    Raises:
        ValueError: a target matches nothing, or nothing but unread layers.
        TypeError: a layer cannot be adapted.
    """
    family_presets = family_presets or {}
    presets = dict.fromkeys((*PRESETS, *family_presets))
    tokens = _split_targets(targets)
    layers = dict(layers_with_weight(model))
    by_name: dict[str, bool] = {}  # of the chosen layers
    for token in (*tokens, *extra_presets):
        if token.startswith("!"):
            continue
        matched_layers = []
        for name, layer in layers.items():
            if _matches(token, name, layer, family_presets):
                matched_layers.append(name)
        is_requested = token in tokens  # and not one that the method adds where it matches
        if not matched_layers and is_requested:
            other_names = [name for name in (*presets, *layers) if name != token]
            raise ValueError(f"target {token!r} matches no layer{did_you_mean(token, other_names)}")
        has_only_unread = all(is_unread(name, unread_layers) for name in matched_layers)
        if matched_layers and is_requested and has_only_unread:
            raise ValueError(
                f"target {token!r} chooses only layers that no output of the model depends on, which would "
                f"never get a gradient: {shorten_list(matched_layers)}"
            )
        # a method may skip layers of a preset that it cannot change, but not one that was named on purpose
        is_preset = token.partition("@")[0] in presets
        for name in matched_layers:
            by_name[name] = by_name.get(name, False) or not is_preset
    for token in tokens:
        if not token.startswith("!"):
            continue
        pattern = token[1:]
        excluded_layers = [name for name in layers if name_matches(pattern, name)]
        if not excluded_layers:
            raise ValueError(f"exclusion {token!r} matches no layer{did_you_mean(pattern, layers)}")
        for name in excluded_layers:
            by_name.pop(name, None)
    return sites_by_name(model, by_name, prefix)


def sites_by_name(model: nn.Module, names: Mapping[str, bool], prefix: str = "") -> list[TargetSite]:
    """The layers of a model with these names, in the model's order; layers sharing a weight are one site.

    Args:
        model: the model.
        names: module name -> `TargetSite.by_name`.
        prefix: what the sites' names begin with, e.g. `unet.`.

    Raises:
        ValueError: the model has no layer of a name.
        TypeError: a layer cannot be adapted.
    """
    layers = dict(layers_with_weight(model))
    for name in names:
        if name not in layers:
            raise ValueError(f"the model has no layer {name!r} with a weight{did_you_mean(name, layers)}")
    # by id, since two parameters with equal values are still two weights
    layers_by_weight: dict[int, list[nn.Module]] = {}
    for layer in layers.values():
        layers_by_weight.setdefault(id(layer.weight), []).append(layer)
    sites: dict[int, TargetSite] = {}
    for name, layer in layers.items():
        weight_id = id(layer.weight)
        if name not in names or weight_id in sites:
            continue
        check_not_fused(model, name)
        # the site has the name of its first layer
        site = site_of_layer(prefix + name, layer)
        sharing_layers = layers_by_weight[weight_id]
        if any(_kind(other) != site.kind for other in sharing_layers):
            raise TypeError(
                f"{name} shares its weight with a layer of another kind; exclude it with '!{name}'"
            )
        sites[weight_id] = TargetSite(site, tuple(sharing_layers), names[name])
    return list(sites.values())


def site_of_layer(name: str, layer: nn.Module) -> Site:
    """Describes a layer's weight.

    Raises:
        TypeError: the exact type of the layer is unknown, or its weight is neither a plain float tensor nor
            quantised in a known way.
        ValueError: the layer's forward is overridden by a hook.
    """
    if not can_adapt(layer):
        raise TypeError(
            f"{name} is a {type(layer).__module__}.{type(layer).__qualname__}, which cannot be adapted; "
            f"exclude it with the target '!{name}' (supported: {', '.join(cls.__name__ for cls in ADAPTED)}, "
            "diffusers' FP32LayerNorm, RMSNorm and Krea2RMSNorm, and Linear layers quantised by "
            "bitsandbytes, torchao or GGUF)"
        )
    # accelerate's hooks put a forward into the instance, which hides that of the adapted class
    if "forward" in layer.__dict__ or hasattr(layer, "_hf_hook"):
        raise ValueError(
            f"{name}: its forward is overridden by a hook, so an adapter would have no effect; "
            "attach before offloading, dispatching or casting the model"
        )
    bias = getattr(layer, "bias", None)
    layer_state = layer_state_of([layer])
    if layer_state.quantised is None:
        _check_plain(f"{name}.weight", layer.weight)
    _check_plain(f"{name}.bias", bias)
    groups = layer.groups if isinstance(layer, _CONV_TYPES) else 1
    base = layer_state.base()  # not layer.weight: a merged class table may have more rows
    return Site(name, _kind(layer), tuple(base.shape), groups, bias is not None)


def _check_plain(name: str, tensor: Tensor | None) -> None:
    """Raises TypeError for a tensor that is cast for storage, quantised in an unknown way, or no float."""
    if tensor is None or (type(tensor) in _PLAIN_TYPES and tensor.dtype in _PLAIN_DTYPES):
        return
    raise TypeError(
        f"{name} is a {type(tensor).__qualname__} of {tensor.dtype}, no plain tensor of float16, bfloat16, "
        "float32 or float64: weights cast for storage, or quantised other than by bitsandbytes, torchao or "
        "GGUF, cannot be adapted; load the base in bfloat16 or float32"
    )


def assign_ranks(sites: Sequence[Site], patterns: Mapping[str, int]) -> dict[str, int]:
    """The rank of every site that a pattern names; the last matching pattern wins.

    Args:
        sites: the sites of an adapter.
        patterns: glob on site names -> rank.

    Raises:
        ValueError: a pattern matches no site.
    """
    site_names = [site.name for site in sites]
    ranks: dict[str, int] = {}
    for pattern, rank in patterns.items():
        matched_sites = [name for name in site_names if name_matches(pattern, name)]
        if not matched_sites:
            raise ValueError(f"rank pattern {pattern!r} matches no site{did_you_mean(pattern, site_names)}")
        ranks.update(dict.fromkeys(matched_sites, rank))
    return ranks


def is_unread(name: str, unread_layers: Sequence[str]) -> bool:
    """Whether a layer is one of those that no output depends on, given as globs."""
    return any(name_matches(pattern, name) for pattern in unread_layers)


def layers_with_weight(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer that holds a weight of its own, whether it can be adapted or not, with its name."""
    for name, layer in model.named_modules():
        if isinstance(getattr(layer, "weight", None), nn.Parameter):
            yield name, layer


def _split_targets(targets: str | Sequence[str]) -> list[str]:
    """Presets, globs and exclusions; raises ValueError where there are exclusions at most."""
    tokens = []
    for target in targets.split("+") if isinstance(targets, str) else targets:
        token = target.strip()
        if token:
            tokens.append(token)
    if all(token.startswith("!") for token in tokens):
        raise ValueError(
            f"targets {targets!r} choose nothing; presets: {', '.join(PRESETS)}, or globs on module names"
        )
    return tokens


def _kind(layer: nn.Module) -> LayerKind | None:
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, _CONV_TYPES):
        return "conv"
    if isinstance(layer, nn.Embedding):
        return "embedding"
    return "norm" if is_norm(layer) else None


def _matches(token: str, name: str, layer: nn.Module, family_presets: Mapping[str, Sequence[str]]) -> bool:
    """Whether a preset or glob, alone or below certain modules (`attention@blocks.0`), chooses a layer."""
    token, is_limited, modules = token.partition("@")
    if is_limited and not (name_matches(modules, name) or name_matches(f"{modules}.*", name)):
        return False
    kind = _kind(layer)
    if token in family_presets:
        is_product = kind in ("linear", "conv")
        return is_product and any(name_matches(pattern, name) for pattern in family_presets[token])
    if token == "all":
        return kind in ("linear", "conv")
    if token in ("linear", "conv", "norm", "embedding"):
        return kind == token
    if token == "mlp":
        return kind in ("linear", "conv") and name.endswith(_MLP_LAYERS)
    if token == "class_embedding":
        return kind == "embedding" and is_class_table(name)
    if token in ("attention", "qv"):
        projections = _QV_PROJECTIONS if token == "qv" else _QV_PROJECTIONS + _OTHER_PROJECTIONS
        is_projection = name in projections or name.endswith(tuple(f".{leaf}" for leaf in projections))
        return kind in ("linear", "conv") and is_projection
    return name_matches(token, name)


def name_matches(pattern: str, name: str) -> bool:
    """Whether a glob matches a module name; one without wildcards also matches the name's last parts.

    `{4-11}` in the glob stands for every number from 4 to 11.
    """
    for glob in _expand_ranges(pattern):
        has_wildcard = any(character in glob for character in "*?[")
        if fnmatchcase(name, glob) or (not has_wildcard and name.endswith("." + glob)):
            return True
    return False


@lru_cache(maxsize=1024)
def _expand_ranges(pattern: str) -> tuple[str, ...]:
    """The globs without ranges that a pattern stands for."""
    match = _RANGE.search(pattern)
    if match is None:
        return (pattern,)
    first = int(match[1])
    last = int(match[2])
    if not first <= last < _LARGEST_BLOCK:
        raise ValueError(
            f"{match[0]} in {pattern!r} is no range of blocks: the first number must not be above the last, "
            f"and the last must be below {_LARGEST_BLOCK}"
        )
    globs: list[str] = []
    # a pattern may hold several ranges: each call expands the first one
    for number in range(first, last + 1):
        globs += _expand_ranges(f"{pattern[: match.start()]}{number}{pattern[match.end() :]}")
    return tuple(globs)
