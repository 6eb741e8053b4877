"""Other tools' names for the layers of a model: flattened, prefixed, of original code, old spellings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from diffadapt.adapters.architectures import OriginalLayer, architecture_of
from diffadapt.adapters.targets import layers_with_weight
from diffadapt.common.pipeline_components import is_in_text_encoder, is_text_encoder
from diffadapt.formats.foreign.fused_layers import LayerPath, LayerRows
from diffadapt.formats.sgm_names import ALL_BLOCKS, sgm_path

_DENOISER = {
    "dotted": ("", "unet.", "transformer.", "diffusion_model."),
    "flat": ("lora_unet_", "lycoris_", "lora_transformer_"),
}
# how names begin in the original code of FLUX and SD3, and in files of kohya's scripts for them
_ORIGINAL_TRANSFORMERS = re.compile(
    r"(?:lora_unet_|lycoris_|diffusion_model\.|transformer\.|model\.)*(?:double|single|joint)_blocks[._]\d"
)
# of diffusers' attention: AttentionModuleMixin.fuse_projections
_FUSED_PROJECTIONS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
# ends of paths -> what older files call them
_OLD_ENDS = {
    ".to_out.0": ".to_out",
    ".q_proj": ".to_q",
    ".k_proj": ".to_k",
    ".v_proj": ".to_v",
    ".out_proj": ".to_out",
}


class LayerNames:
    """The layers of a model by every name that other tools give them.

    Args:
        roots: the models by component name.
    """

    def __init__(self, roots: Mapping[str, nn.Module]):
        self.by_name: dict[str, LayerPath] = {}
        self.by_original_name: dict[str, list[LayerRows]] = {}
        for component, module in roots.items():
            paths = [path for path, _ in layers_with_weight(module)]
            self._add_original_names(component, module)
            num_resnets = _resnets_per_block(paths)
            for path in paths:
                for name in _names(component, path, num_resnets):
                    # two components can have a name in common; the first one keeps it
                    self.by_name.setdefault(name, (component, path))

    def find(self, name: str) -> LayerPath | None:
        """A layer by one of its names; None where the model has no such layer."""
        return self.by_name.get(_without_processor(name))

    def find_original(self, name: str) -> list[LayerRows]:
        """The layers that one weight holds in a transformer's original code, or once diffusers fuses
        projections, by one of its names."""
        return self.by_original_name.get(name, [])

    def _add_original_names(self, component: str, module: nn.Module) -> None:
        names = architecture_of(module).published_names
        if names is None or names.original_layer is None:
            return
        layers = dict(layers_with_weight(module))
        for path, layer in layers.items():
            places = [names.original_layer(path), _place_in_fused_projection(path, layers)]
            for place in places:
                if place is not None:
                    self._add_part(LayerRows((component, path), place, len(layer.weight)))

    def _add_part(self, part: LayerRows) -> None:
        dotted = part.place.path
        for prefix in _DENOISER["dotted"]:
            self.by_original_name.setdefault(prefix + dotted, []).append(part)
        for prefix in _DENOISER["flat"]:
            self.by_original_name.setdefault(prefix + dotted.replace(".", "_"), []).append(part)


def _place_in_fused_projection(path: str, layers: Mapping[str, nn.Module]) -> OriginalLayer | None:
    """A layer's place in the projection that `fuse_qkv_projections` of diffusers makes of three."""
    parent, _, projection = path.rpartition(".")
    for fused, projections in _FUSED_PROJECTIONS.items():
        if projection not in projections:
            continue
        siblings = [layers.get(f"{parent}.{name}") for name in projections]
        if None in siblings:
            return None
        before = siblings[: projections.index(projection)]
        first_row = sum(len(layer.weight) for layer in before)
        return OriginalLayer(f"{parent}.{fused}", first_row, len(layers[path].weight))
    return None


def missing_layers_hint(missing: Iterable[str]) -> str:
    """The end of an error message about layers that a model does not have; empty where nothing is known."""
    if not any(_ORIGINAL_TRANSFORMERS.match(layer) for layer in missing):
        return ""
    return (
        "; these are names of the original code of FLUX and SD3: give a base of the family that the file was "
        "trained on"
    )


def current_name(layer: str) -> str:
    """A layer's name in an older file of diffusers as today's diffusers writes it."""
    name = _without_processor(layer)
    if name.startswith("transformer."):  # younger than the old names; FLUX.2 has layers called to_out
        return name
    in_text_encoder = is_in_text_encoder(name)
    for end, old_end in _OLD_ENDS.items():
        if name.endswith(old_end) and in_text_encoder == end.endswith("_proj"):
            return name.removesuffix(old_end) + end
    return name


def _resnets_per_block(paths: Iterable[str]) -> int:
    """Resnets of a U-Net's first block, which sgm's numbers depend on; 0 of other models."""
    numbers = set()
    for path in paths:
        if path.startswith("down_blocks.0.resnets."):
            numbers.add(path.split(".")[3])
    return len(numbers)


def _names(component: str, path: str, num_resnets: int) -> Iterator[str]:
    """Every name of one layer."""
    paths = [path]
    if is_text_encoder(component):
        prefix_sets = [_encoder_prefixes(component)]
    else:
        prefix_sets = [_DENOISER]
        if num_resnets:
            paths += _sgm_paths(path, num_resnets)
    if component == "":  # a bare model can be a text encoder
        prefix_sets.append(_encoder_prefixes("text_encoder"))
    paths.append(_other_text_model_level(path))
    spellings = []
    for spelled_path in paths:
        spellings += _spellings(spelled_path)
    for prefixes in prefix_sets:
        for spelling in spellings:
            for prefix in prefixes["dotted"]:
                yield prefix + spelling
            for prefix in prefixes["flat"]:
                yield prefix + spelling.replace(".", "_")


def _encoder_prefixes(component: str) -> dict[str, tuple[str, ...]]:
    """Prefixes of a text encoder's layers; kohya's programs number the encoders from 1: `lora_te2_`."""
    number = component.removeprefix("text_encoder").removeprefix("_") or "1"
    flat = [f"lora_te{number}_"]
    if number == "1":
        flat.insert(0, "lora_te_")  # where the pipeline has only one
    return {"dotted": (f"{component}.", ""), "flat": tuple(flat)}


def _spellings(path: str) -> Iterator[str]:
    """A path, and what older files call it."""
    yield path
    for end, old_end in _OLD_ENDS.items():
        if path.endswith(end):
            yield path.removesuffix(end) + old_end


def _sgm_paths(path: str, num_resnets: int) -> list[str]:
    """The layer's paths in the original code; which block an upsampler belongs to is not told by its name."""
    sgm_paths = set()
    for attended in (ALL_BLOCKS, ()):
        sgm_paths.add(sgm_path(path, num_resnets, attended=attended))
    names = []
    for name in sorted(sgm_paths - {None}):
        names += [name, f"diffusion_model.{name}"]
    return names


def _other_text_model_level(path: str) -> str:
    """The path with or without a level that transformers 5 dropped of its CLIP text models."""
    level = "text_model."
    return path.removeprefix(level) if path.startswith(level) else level + path


def _without_processor(name: str) -> str:
    """A name without the attention processor of diffusers' files of 2023."""
    return name.replace(".processor.", ".").removesuffix(".processor")
