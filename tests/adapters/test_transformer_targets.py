"""Layers that presets choose in the transformer families, and those that no output depends on."""

from pathlib import Path

import pytest
import torch
from helpers.family_pipelines import FAMILIES, denoiser_arguments, denoiser_output, tiny_pipeline
from helpers.method_cases import train, trainable

import diffadapt as da
from diffadapt.adapters.architectures import architecture_of
from diffadapt.adapters.targets import PRESETS, is_unread, layers_with_weight
from diffadapt.adapters.transformer_targets import TRANSFORMERS
from diffadapt.training.report.summary import _adapter_text

pytestmark = pytest.mark.slow

# family -> layers of `attention`, `qv` and `mlp` in the tiny pipelines, which have two blocks of each kind
COUNTS = {
    # 8 projections of joint attention; the last block has no to_add_out, and its add_q_proj is not read
    "sd3": (8 + 6, 4 + 3, 4 + 2),
    "sd35_medium": (8 + 6 + 4, 4 + 3 + 2, 4 + 2),  # and a second attention in the first block
    "sd3_without_t5": (8 + 6, 4 + 3, 4 + 2),
    "flux": (2 * 8 + 2 * 3, 2 * 4 + 2 * 2, 2 * 4 + 2 * 2),  # double blocks, single blocks
    "flux_schnell": (2 * 8 + 2 * 3, 2 * 4 + 2 * 2, 2 * 4 + 2 * 2),
    # one input and one output layer in single blocks
    "flux2_klein": (2 * 8 + 2 * 2, 2 * 4 + 2 * 1, 2 * 4 + 2 * 2),
    "flux2_dev": (2 * 8 + 2 * 2, 2 * 4 + 2 * 1, 2 * 4 + 2 * 2),
    "qwen_image": (8 + 6, 4 + 3, 4 + 2),  # the last block's text stream is not read
    "z_image": (4 * 4, 4 * 2, 4 * 3),  # two layers and two refiners
    "krea2": (4 * 5, 4 * 2, 4 * 3),  # two blocks and two of the text, each with a gate
    "chroma": (2 * 8 + 2 * 3, 2 * 4 + 2 * 2, 2 * 4 + 2 * 2),
    "pixart_sigma": (2 * 8, 2 * 4, 2 * 2),
}
UNREAD = {
    "sd3": {"attn.add_q_proj"},
    "sd3_without_t5": {"attn.add_q_proj"},
    "sd35_medium": {"attn.add_q_proj", "attn.norm_added_q"},
    "qwen_image": {
        "attn.add_q_proj",
        "attn.norm_added_q",
        "attn.to_add_out",
        "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
    },
}
WITH_CLIP = ("sd3", "sd35_medium", "sd3_without_t5", "flux", "flux_schnell")
WITHOUT_CLIP = ("flux2_klein", "flux2_dev", "qwen_image", "z_image", "krea2", "chroma", "pixart_sigma")
families = pytest.mark.parametrize("family", FAMILIES)


def chosen(model, targets, method=None):
    adapter = da.attach(model, method or da.LoRA(rank=1), targets)
    names = [site.name for site in adapter.sites]
    da.detach(adapter)
    return names


def loss(pipe, call):
    output = denoiser_output(pipe, call)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return (output * weights).sum()


def test_the_page_on_targets_names_every_preset_and_every_unread_layer():
    page = (Path(__file__).parents[2] / "docs" / "targets.md").read_text(encoding="utf-8")
    assert all(f"`{preset}`" in page for preset in PRESETS)
    for targets in TRANSFORMERS.values():
        for name in targets.last_block_unread:
            assert f"`{name}`" in page or f"`{name.partition('.')[0]}.*`" in page, name


@families
def test_presets_choose_so_many_layers(family):
    pipe = tiny_pipeline(family)
    attention, query_value, mlp = COUNTS[family]
    assert len(chosen(pipe, "attention")) == attention
    assert len(chosen(pipe, "qv")) == query_value
    assert len(chosen(pipe, "mlp")) == mlp
    is_fused = family.startswith("flux2")  # fused layers are in both
    assert len(chosen(pipe, "attention+mlp")) == attention + mlp - (4 if is_fused else 0)
    bare_names = [f"transformer.{name}" for name in chosen(pipe.transformer, "attention")]
    assert bare_names == chosen(pipe, "attention")


@families
def test_presets_choose_layers_of_blocks_alone(family):
    names = chosen(tiny_pipeline(family).transformer, "attention+mlp")
    assert all("blocks." in name or name.startswith(("layers.", "noise_", "context_")) for name in names)


@families
def test_unread_layers_are_those_without_a_gradient(family):
    pipe = tiny_pipeline(family)
    loss(pipe, denoiser_arguments(family, pipe)).backward()
    patterns = architecture_of(pipe.transformer).unread_layers.get("transformer", ())
    without_gradient = set()
    for name, layer in layers_with_weight(pipe.transformer):
        gradient = layer.weight.grad
        has_gradient = gradient is not None and gradient.abs().max() > 0
        assert has_gradient != is_unread(name, patterns), name
        if not has_gradient:
            without_gradient.add(name.removeprefix("transformer_blocks.1."))
    assert without_gradient == UNREAD.get(family, set())


@families
@pytest.mark.parametrize("targets", ["attention", "attention+mlp", "qv", "all"])
def test_every_trained_tensor_gets_a_gradient(family, targets):
    pipe = tiny_pipeline(family)
    call = denoiser_arguments(family, pipe)
    adapter = da.attach(pipe, da.LoRA(rank=2), targets)
    train(adapter)  # away from the start, where one factor is zero
    loss(pipe, call).backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "family", ["sd35_medium", "flux", "flux2_klein", "qwen_image", "z_image", "krea2", "chroma"]
)
def test_every_trained_norm_gets_a_gradient(family):
    pipe = tiny_pipeline(family)
    call = denoiser_arguments(family, pipe)
    adapter = da.attach(pipe, da.Norms(), "norm")
    loss(pipe, call).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in trainable(adapter))


def test_layers_left_out_are_named_on_the_adapter_and_in_the_summary():
    pipe = tiny_pipeline("sd3")
    adapter = da.attach(pipe, da.LoRA(rank=1), "attention")
    assert adapter.unread_layers == ("transformer.transformer_blocks.1.attn.add_q_proj",)
    assert "left out, as no output depends on them: transformer.transformer_blocks.1.attn.add_q_proj" in (
        _adapter_text(adapter, 10_000)
    )
    da.detach(adapter)
    adapter = da.attach(pipe, da.LoRA(rank=1), "attention@transformer_blocks.0")
    assert adapter.unread_layers == ()
    assert "left out" not in _adapter_text(adapter, 10_000)


@pytest.mark.parametrize("family", UNREAD)
def test_a_target_for_an_unread_layer_says_why_it_is_left_out(family):
    pipe = tiny_pipeline(family)
    with pytest.raises(
        ValueError, match=r"no output of the model depends on.*never get a gradient.*add_q_proj"
    ):
        da.attach(pipe, da.LoRA(rank=1), "attention+transformer_blocks.1.attn.add_q_proj")
    assert da.attached(pipe) == {}
    assert chosen(pipe, "*.add_q_proj") == ["transformer.transformer_blocks.0.attn.add_q_proj"]


def test_blocks_can_be_chosen_by_range():
    pipe = tiny_pipeline("flux")
    names = chosen(pipe.transformer, "attention@single_transformer_blocks.{1-37}")
    assert names == [f"single_transformer_blocks.1.attn.{name}" for name in ("to_q", "to_k", "to_v")]


@pytest.mark.parametrize("family", WITH_CLIP)
def test_clip_encoders_are_adapted_and_t5_is_not(family):
    pipe = tiny_pipeline(family)
    call = denoiser_arguments(family, pipe)
    adapter = da.attach(pipe, da.LoRA(rank=2), "attention", text_encoder_targets="attention")
    train(adapter)
    roots = {site.name.partition(".")[0] for site in adapter.sites}
    clip_encoders = {"text_encoder"} if family.startswith("flux") else {"text_encoder", "text_encoder_2"}
    assert roots == {"transformer", *clip_encoders} == set(adapter.roots)

    encoded = pipe.encode_prompt("a sks dog", *[None] * (1 if family.startswith("flux") else 2))
    pooled = encoded[1] if family.startswith("flux") else encoded[2]
    states = {"encoder_hidden_states": encoded[0], "pooled_projections": pooled}
    loss(pipe, (call[0], call[1] | states)).backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("family", WITHOUT_CLIP)
def test_t5_and_language_models_are_refused_with_the_reason(family):
    pipe = tiny_pipeline(family)
    with pytest.raises(
        ValueError, match=r"no text encoder that can be adapted, but text_encoder \((T5|Qwen|Mistral).*CLIP"
    ):
        da.attach(pipe, da.LoRA(rank=1), "attention", text_encoder_targets="linear")
    assert da.attached(pipe) == {}
