"""Names of transformers in original code: diffusers' own conversion of original checkpoints undoes them."""

import pytest
import torch
from diffusers.loaders import single_file_utils
from helpers.family_pipelines import tiny_pipeline
from helpers.transformer_layout import original_checkpoint
from torch import Tensor

from diffadapt.adapters.architectures import architecture_of
from diffadapt.models.families import FAMILIES

# family -> diffusers' conversion, the width it is made for, the name of a norm's weight in the original code
CONVERSIONS = {
    "sd3": ("sd3", 1536, "weight"),
    "sd35_medium": ("sd3", 1536, "weight"),
    "flux": ("flux", 3072, "scale"),
    "flux_schnell": ("flux", 3072, "scale"),
    "flux2_klein": ("flux2", 3072, "scale"),
    "z_image": ("z_image", 3840, "weight"),
    "krea2": ("krea2", 6144, "scale"),
    "chroma": ("chroma", 3072, "scale"),
}
NO_PLACE = {  # parts of names that belong to no layer whose change a file could hold
    "sd3": ("pos_embed.pos_embed",),
    "sd35_medium": ("pos_embed.pos_embed",),
    "z_image": ("pad_token",),
    "krea2": ("norm", "scale_shift_table"),
    "chroma": ("distilled_guidance_layer.norms",),
}
# keys that a conversion needs beside the layers
REQUIRED = {"sd3": ("pos_embed",), "chroma": ("distilled_guidance_layer.norms.0.scale",)}


def names_of(transformer, width: int):
    """The published names of a tiny transformer's kind, in a published width."""
    config = {**transformer.config, "num_attention_heads": 1, "attention_head_dim": width, "dim": width}
    for family in FAMILIES.values():
        if getattr(family, "transformer_class", None) == type(transformer).__name__:
            return family.published_names(config)


def random_parameters(transformer, names, width: int) -> dict[str, Tensor]:
    """Values for every parameter, with the rows that the published model has, one column wide."""
    parameters = {}
    for key, value in transformer.state_dict().items():
        path, _, kind = key.rpartition(".")
        layer = names.original_layer(path)
        rows = len(value) if layer is None or layer.num_rows is None else layer.num_rows
        parameters[key] = torch.randn(rows, 1) if kind == "weight" else torch.randn(rows)
    return parameters


@pytest.mark.parametrize("family", CONVERSIONS)
def test_diffusers_converts_a_checkpoint_of_these_names_back(family):
    conversion, width, norm_weight = CONVERSIONS[family]
    transformer = tiny_pipeline(family).transformer
    names = names_of(transformer, width)
    every_parameter = random_parameters(transformer, names, width)
    placed = {}
    for key, value in every_parameter.items():
        if names.original_layer(key.rpartition(".")[0]) is not None:
            placed[key] = value
    unplaced = every_parameter.keys() - placed.keys()
    assert all(any(part in key for part in NO_PLACE.get(family, ())) for key in unplaced), unplaced
    checkpoint = original_checkpoint(placed, names, norm_weight=norm_weight)
    checkpoint |= dict.fromkeys(REQUIRED.get(conversion, ()), torch.zeros(1))
    convert = getattr(single_file_utils, f"convert_{conversion}_transformer_checkpoint_to_diffusers")
    converted = convert(checkpoint)
    for key, value in placed.items():
        assert torch.equal(converted[key], value), key


def test_pixart_has_the_original_names_of_its_published_files():
    transformer = tiny_pipeline("pixart_sigma").transformer
    names = names_of(transformer, 1152)
    unplaced = []
    for path, module in transformer.named_modules():
        if getattr(module, "weight", None) is not None and names.original_layer(path) is None:
            unplaced.append(path)
    assert not unplaced
    key = names.original_layer("transformer_blocks.1.attn2.to_v")
    assert (key.path, key.first_row, key.num_rows) == ("blocks.1.cross_attn.kv_linear", 1152, 1152)
    query = names.original_layer("transformer_blocks.0.attn1.to_k")
    assert (query.path, query.first_row, query.num_rows) == ("blocks.0.attn.qkv", 1152, 1152)


def test_qwen_image_has_the_names_of_diffusers():
    names = architecture_of(tiny_pipeline("qwen_image").transformer).published_names
    assert names.original_layer("transformer_blocks.0.attn.to_q").path == "transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("sd3", "stable-diffusion-v3-medium"),
        ("sd35_medium", "stable-diffusion-v3.5-medium"),
        ("flux", "flux-1-dev"),
        ("flux_schnell", "flux-1-schnell"),
        ("flux2_klein", "Flux.2-klein-4b"),
    ],
)
def test_the_architecture_follows_from_the_configuration(family, architecture):
    published = architecture_of(tiny_pipeline(family).transformer)
    assert published.published_names.architecture == architecture
    assert published.component == "transformer"
    assert not published.published_names.has_published_sizes
