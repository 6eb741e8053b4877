"""Facts about the layers of bases: for the choice of layers, and for names in files of other programs.

A family of models registers its own here (`diffadapt.models.families`), because attaching and files lie below
the families. Of transformers that nobody registered the layers are known still (`transformer_targets`). Any
other base is treated by the general rules: presets by the usual names of projections, every layer adaptable,
no names in kohya's format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from diffadapt.adapters.transformer_targets import TRANSFORMERS


@dataclass(frozen=True)
class OriginalLayer:
    """Where the original code of a transformer holds a layer of diffusers' model.

    Attributes:
        path: of the layer in the original code; its weight can hold several layers of diffusers, one below
            the other.
        first_row: of this layer in such a weight; 0 where the weight is this layer's alone.
        num_rows: of this layer in such a weight; None where the weight is this layer's alone.
        swaps_halves: whether the lower half of the rows is the upper one there.
    """

    path: str
    first_row: int = 0
    num_rows: int | None = None
    swaps_halves: bool = False


@dataclass(frozen=True)
class PublishedNames:
    """Names by which files of other programs know a base and its layers.

    Attributes:
        architecture: `modelspec.architecture` without the ending for adapters, "stable-diffusion-v1".
        base_version: `ss_base_model_version`, "sd_v1".
        resolution: side, in pixels, of the images the published model was trained on.
        has_published_sizes: whether the layers have the sizes of a published model of this architecture.
        original_path: a layer's path in diffusers -> in the original code, where kohya's files use that name;
            None for a layer that the original code does not have.
        original_layer: a layer's path in diffusers -> its place in the original code; None for a layer
            without one. Only of transformers, whose layers have diffusers' names in files for ComfyUI.
        numbers_first_encoder: whether layers of the first text encoder begin with `lora_te1_` and not with
            `lora_te_`.
    """

    architecture: str
    base_version: str
    resolution: int
    has_published_sizes: bool = True
    original_path: Callable[[str], str | None] | None = None
    original_layer: Callable[[str], OriginalLayer | None] | None = None
    numbers_first_encoder: bool = False


@dataclass(frozen=True)
class Architecture:
    """What is particular about the layers of a base.

    Attributes:
        name: "sd1", "sdxl"; "other" where nothing is known.
        component: the pipeline's component that the denoiser is.
        target_presets: preset -> globs on names of layers, in place of the general rule of that preset.
        unread_layers: component -> globs on names of layers. No output depends on these layers, so they would
            never get a gradient; presets and globs leave them out.
        published_names: None for a base that neither kohya's programs nor ComfyUI know.
    """

    name: str
    component: str = ""
    target_presets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unread_layers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    published_names: PublishedNames | None = None


UNKNOWN = Architecture("other")  # for which the general rules hold

# Each takes a pipeline's components by name and its denoiser.
Describe = Callable[[nn.Module, Mapping[str, nn.Module]], "Architecture | None"]
_DESCRIPTIONS: list[Describe] = []


def register_architecture(describe: Describe) -> None:
    """Adds a family's description; it returns None for the denoisers of other families."""
    _DESCRIPTIONS.append(describe)


def architecture_of(denoiser: nn.Module | None, roots: Mapping[str, nn.Module] | None = None) -> Architecture:
    """The facts about a denoiser.

    Args:
        roots: the models beside it by component name, where facts about text encoders are wanted.
    """
    for describe in _DESCRIPTIONS:
        architecture = None if denoiser is None else describe(denoiser, roots or {})
        if architecture is not None:
            return architecture
    if denoiser is None:
        return UNKNOWN
    return transformer_architecture(denoiser) or UNKNOWN


def transformer_architecture(denoiser: nn.Module) -> Architecture | None:
    """The facts about the layers of a transformer, for a family to add its published names to.

    Returns:
        None for a denoiser that `transformer_targets` does not list.
    """
    targets = TRANSFORMERS.get(type(denoiser).__name__)
    if targets is None:
        return None
    component = "transformer"
    unread_layers = {}
    # blocks of two streams, image and text: nothing reads the text stream of the last one
    if targets.last_block_unread:
        last_block = f"transformer_blocks.{len(denoiser.transformer_blocks) - 1}"
        unread_layers[component] = tuple(f"{last_block}.{name}" for name in targets.last_block_unread)
    presets = {"attention": targets.attention, "qv": targets.query_value, "mlp": targets.mlp}
    return Architecture(targets.name, component, target_presets=presets, unread_layers=unread_layers)
