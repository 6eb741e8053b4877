"""Which layers targets choose, and what is said when they choose none."""

import re

import pytest
import torch
from helpers.models import SelfAttention, denoiser
from helpers.pipelines import WIDTH, tiny_unet
from torch import nn

import diffadapt as da
from diffadapt.adapters.targets import PRESETS, assign_ranks, find_sites

ATTENTION = [f"blocks.{i}.{leaf}" for i in (0, 1) for leaf in ("to_q", "to_k", "to_v", "to_out.0")]
CONVOLUTIONS = ["conv_in", "depthwise", "conv_out"]
NORMS = ["norm", "ln"]


def names(targets, model=None):
    return [found.site.name for found in find_sites(model or denoiser(), targets)]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("attention", ATTENTION),
        ("qv", [name for name in ATTENTION if name.endswith(("to_q", "to_v"))]),
        ("linear", ATTENTION),
        ("conv", CONVOLUTIONS),
        ("norm", NORMS),
        ("embedding", ["class_embedding"]),
        ("all", ["conv_in", *ATTENTION, "depthwise", "conv_out"]),
        ("blocks.0.*", ATTENTION[:4]),
        ("blocks.?.to_q", ["blocks.0.to_q", "blocks.1.to_q"]),
        ("to_k", ["blocks.0.to_k", "blocks.1.to_k"]),
        ("conv_in", ["conv_in"]),
        ("qv+norm", ["blocks.0.to_q", "blocks.0.to_v", "blocks.1.to_q", "blocks.1.to_v", *NORMS]),
        (["conv_out", "conv_in"], ["conv_in", "conv_out"]),
        ("conv+!depthwise", ["conv_in", "conv_out"]),
        ("attention+!blocks.1.*+!to_k", ["blocks.0.to_q", "blocks.0.to_v", "blocks.0.to_out.0"]),
        ("blocks.{0-7}.to_q", ["blocks.0.to_q", "blocks.1.to_q"]),
        ("attention@blocks.{1-1}", ATTENTION[4:]),
        ("attention+!blocks.{1-9}.*", ATTENTION[:4]),
        ("qv@blocks.0+linear@*.1", ["blocks.0.to_q", "blocks.0.to_v", *ATTENTION[4:]]),
        ("*.to_[kq]@blocks.1", ["blocks.1.to_q", "blocks.1.to_k"]),
        (" conv + norm ", ["conv_in", "norm", "ln", "depthwise", "conv_out"]),
    ],
    ids=str,
)
def test_targets_choose_layers_in_the_models_order(targets, expected):
    if targets == "qv+norm":
        assert sorted(names(targets)) == sorted(expected)
    else:
        model_order = [name for name, _ in denoiser().named_modules() if name in expected]
        assert names(targets) == model_order
        assert set(model_order) == set(expected)


def test_every_preset_is_described():
    assert {"attention", "qv", "linear", "conv", "norm", "embedding", "all"} <= PRESETS.keys()
    assert all(names(preset) for preset in PRESETS if preset != "mlp")
    assert names("mlp", tiny_unet())


def test_a_site_tells_shape_groups_and_bias():
    (depthwise,) = (found.site for found in find_sites(denoiser(), "depthwise"))
    assert (depthwise.kind, depthwise.shape, depthwise.groups) == ("conv", (8, 1, 3, 3), 8)
    assert depthwise.has_bias
    assert (depthwise.out, depthwise.fan_in, depthwise.channels_in, depthwise.kernel) == (8, 9, 1, (3, 3))
    (query,) = (found.site for found in find_sites(denoiser(), "blocks.0.to_q"))
    assert (query.kind, query.shape, query.kernel, query.has_bias) == ("linear", (8, 8), (), False)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("atention", "'atention' matches no layer; did you mean attention"),
        ("blocks.0.to_qq", "did you mean blocks.0.to_q"),
        ("blocks.7.*", "'blocks.7.*' matches no layer"),
        ("conv+nrom", "'nrom' matches no layer; did you mean norm"),
        ("conv+!depthwize", "exclusion '!depthwize' matches no layer; did you mean depthwise"),
        ("attention@blocks.{7-9}", "target 'attention@blocks.{7-9}' matches no layer"),
        ("blocks.{9-7}.*", "{9-7} in 'blocks.{9-7}.*' is no range of blocks"),
        ("blocks.{0-1000}.*", "and the last must be below 1000"),
        ("", "choose nothing"),
        ("!conv_in", "choose nothing"),
        ([], "choose nothing"),
    ],
    ids=str,
)
def test_a_target_that_matches_nothing_is_an_error_naming_near_ones(targets, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        names(targets)


def test_a_target_that_is_right_elsewhere_is_not_suggested_again():
    with pytest.raises(ValueError, match="target 'conv' matches no layer") as error:
        da.attach(nn.Sequential(nn.Linear(2, 2)), da.LoRA(), "conv")
    assert "did you mean conv" not in str(error.value)


def test_targets_that_exclude_all_they_choose_are_an_error():
    with pytest.raises(ValueError, match="choose none"):
        da.attach(denoiser(), da.LoRA(), "conv_in+!conv_in")


def test_a_layer_of_unknown_type_is_refused_with_the_way_to_exclude_it():
    with pytest.raises(TypeError, match=r"NonDynamicallyQuantizableLinear.*'!attention.out_proj'"):
        names("linear", SelfAttention())
    assert names("linear+!attention.out_proj", SelfAttention()) == ["mlp"]


def test_a_subclass_of_a_known_layer_is_refused():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match="Doubled"):
        names("linear", nn.Sequential(Doubled(2, 2)))


@pytest.mark.parametrize("attribute", ["forward", "_hf_hook"])
def test_a_layer_whose_forward_is_hooked_is_refused(attribute):
    model = denoiser()
    setattr(model.conv_in, attribute, lambda x: x)
    with pytest.raises(ValueError, match="conv_in: its forward is overridden"):
        names("conv", model)


def test_layers_that_share_a_weight_are_one_site():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    (first, second) = find_sites(model, "linear")
    assert (first.site.name, first.layers) == ("0", (model[0], model[2]))
    assert (second.site.name, second.layers) == ("1", (model[1],))


def test_choosing_any_of_the_layers_that_share_a_weight_chooses_all():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    (found,) = find_sites(model, "1")
    assert found.layers == (model[0], model[1])


def test_a_linear_layer_tied_to_an_embedding_is_refused():
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    with pytest.raises(TypeError, match=r"shares its weight with a layer of another kind.*'!head'"):
        names("linear", model)
    with pytest.raises(TypeError, match="shares its weight"):
        names("embedding", model)


def test_the_last_matching_rank_pattern_wins():
    sites = [found.site for found in find_sites(denoiser(), "attention")]
    ranks = assign_ranks(sites, {"*.to_q": 2, "blocks.1.*": 5})
    assert ranks["blocks.0.to_q"] == 2
    assert ranks["blocks.1.to_q"] == 5
    assert "blocks.0.to_k" not in ranks


def test_a_rank_pattern_that_matches_nothing_is_an_error():
    sites = [found.site for found in find_sites(denoiser(), "attention")]
    with pytest.raises(ValueError, match=r"rank pattern '\*.to_queue' matches no site"):
        assign_ranks(sites, {"*.to_queue": 2})


class Quantised(torch.Tensor):
    """A stand-in for the weights of torchao, quanto and GGUF behind a plain Linear."""


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(4, 4).as_subclass(Quantised),
        torch.zeros(4, 4, dtype=torch.int8),
        torch.zeros(4, 4, dtype=torch.float8_e4m3fn),
    ],
    ids=["subclass", "int8", "float8"],
)
@pytest.mark.parametrize("spec", ["lora", "full", "bitfit", "dora"])
def test_a_weight_that_is_no_plain_float_is_refused_at_attach(weight, spec):
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(TypeError, match=r"0\.weight is a .* cannot be adapted; load the base in bfloat16"):
        da.attach(model, da.make_method(spec), "linear")
    assert type(model[0]) is nn.Linear


def test_a_preset_that_matches_nothing_is_not_offered_again():
    with pytest.raises(ValueError, match=r"target 'conv' matches no layer(?!.*did you mean conv)"):
        find_sites(nn.Sequential(nn.Linear(2, 2)), "conv")


@pytest.mark.parametrize("spec", sorted(da.METHODS))
def test_attaching_does_not_follow_the_default_device(spec):
    method = da.make_method(spec)
    expected = da.attach(denoiser(), method, "all+norm+embedding")
    model = denoiser()
    with torch.device("meta"):
        adapter = da.attach(model, method, "all+norm+embedding")
    for own, other in zip(adapter.parameters(), expected.parameters(), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("spec", ["lora(rank=2)", "peft:LORA(r=2)"])
def test_projections_are_not_fused_around_an_adapter(spec):
    unet = tiny_unet()
    adapters = [da.attach(unet, da.make_method(spec), "attention")]
    if not spec.startswith("peft:"):
        adapters.append(da.attach(unet, da.BitFit(), "attention", name="second"))
    for adapter in adapters:
        with pytest.raises(RuntimeError, match="fuse_qkv_projections: an adapter is attached"):
            unet.fuse_qkv_projections()
        da.detach(adapter)
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"to_q: the model's projections are fused"):
        da.attach(unet, da.make_method(spec), "attention")
    unet.unfuse_qkv_projections()
    da.attach(unet, da.make_method(spec), "attention")


def test_storage_in_another_type_before_attaching_is_refused():
    unet = tiny_unet()
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"forward is overridden by a hook.*attach before .*casting"):
        da.attach(unet, da.LoRA(rank=2), "attention")


def test_storage_in_another_type_after_attaching_can_sample():
    """diffusers' hooks cast weights for the forward alone."""
    unet = tiny_unet()
    adapter = da.attach(unet, da.LoRA(rank=2), "attention")
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = (torch.ones(1, 4, 8, 8), 3, torch.ones(1, 5, WIDTH))
    with torch.no_grad():
        before = unet(*inputs).sample
        unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        after = unet(*inputs).sample
        with da.disabled(unet):
            base = unet(*inputs).sample
    assert (after - before).abs().max() < 0.1 * (before - base).abs().max()
