"""Attaching to models and pipelines, taking off again, and refusing without a trace."""

import pytest
import torch
from helpers.method_cases import train
from helpers.models import SelfAttention, denoiser, image, pipeline, state
from torch import nn

import diffadapt as da


def test_only_adapter_tensors_are_trained_and_detaching_restores_every_flag():
    model = denoiser()
    model.conv_in.requires_grad_(False)
    before = state(model)
    adapter = da.attach(model, da.LoRA(rank=2), "conv")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    da.detach(adapter)
    assert state(model) == before


def test_flags_return_only_when_the_last_adapter_goes_in_any_order():
    for order in ((0, 1), (1, 0)):
        model = denoiser()
        before = state(model)
        adapters = [da.attach(model, da.LoRA(rank=2), "conv", name=name) for name in ("one", "two")]
        da.detach(adapters[order[0]])
        assert not any(parameter.requires_grad for parameter in model.parameters())
        da.detach(adapters[order[1]])
        assert state(model) == before


def test_adapters_on_other_layers_of_a_model_do_not_meet():
    model, x = denoiser(), image()
    bare = model(x)
    first = da.attach(model, da.LoRA(rank=2), "conv", name="one")
    train(first)
    alone = model(x)
    second = da.attach(model, da.LoRA(rank=2), "attention", name="two")
    train(second)
    assert list(da.attached(model)) == ["one", "two"]
    da.detach(second)
    assert torch.equal(model(x), alone)
    da.detach(first)
    assert torch.equal(model(x), bare)


def test_the_start_is_a_function_of_the_seed_and_the_layers_name():
    starts = {}
    for seed, targets in ((0, "attention"), (0, "blocks.1.*"), (1, "attention")):
        adapter = da.attach(denoiser(), da.LoRA(rank=2), targets, seed=seed)
        starts[seed, targets] = adapter.parts[0].named_tensors()["lora/blocks.1.to_q/down"]
    assert torch.equal(starts[0, "attention"], starts[0, "blocks.1.*"])
    assert not torch.equal(starts[0, "attention"], starts[1, "attention"])


def test_attaching_leaves_torchs_random_state_alone():
    model, before = denoiser(), torch.get_rng_state()
    da.attach(model, da.FLoRA(rank=2), "all")
    assert torch.equal(torch.get_rng_state(), before)


def test_rank_patterns_set_the_rank_of_single_sites():
    adapter = da.attach(denoiser(), da.LoRA(rank=2), "attention", rank_patterns={"*.to_q": 5})
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.parts[0].named_tensors().items()}
    assert shapes["lora/blocks.0.to_q/up"] == (8, 5)
    assert shapes["lora/blocks.0.to_k/up"] == (8, 2)
    assert adapter.num_parameters == (2 * 5 + 6 * 2) * 16


@pytest.mark.parametrize("rank", [0, -1, True, 2.0, "4"])
def test_a_rank_pattern_needs_a_rank(rank):
    model = denoiser()
    before = state(model)
    with pytest.raises(ValueError, match="rank must be"):
        da.attach(model, da.LoRA(rank=2), "attention", rank_patterns={"*.to_q": rank})
    assert state(model) == before


def test_a_pipeline_is_adapted_by_component():
    pipe = pipeline()
    text, picture = torch.randn(3, 6), image()
    bare = pipe.text_encoder(text), pipe.unet(picture)
    adapter = da.attach(pipe, da.LoRA(rank=2), "attention", text_encoder_targets="qv")
    components = {site.name.partition(".")[0] for site in adapter.sites}
    assert components == {"unet", "text_encoder"}
    assert all(parameter.requires_grad for parameter in pipe.vae.parameters())
    train(adapter)
    assert not torch.equal(pipe.text_encoder(text), bare[0])
    with da.disabled(pipe):
        assert torch.equal(pipe.text_encoder(text), bare[0])
        assert torch.equal(pipe.unet(picture), bare[1])
    da.detach(adapter)
    assert torch.equal(pipe.text_encoder(text), bare[0])
    assert torch.equal(pipe.unet(picture), bare[1])
    assert all(parameter.requires_grad for parameter in pipe.text_encoder.parameters())


def test_text_encoders_are_left_alone_unless_targeted():
    pipe = pipeline()
    adapter = da.attach(pipe, da.LoRA(rank=2), "attention")
    assert all(site.name.startswith("unet.") for site in adapter.sites)
    assert type(pipe.text_encoder.q_proj) is nn.Linear
    assert all(parameter.requires_grad for parameter in pipe.text_encoder.parameters())


def test_tied_layers_share_one_adaptation_of_their_weight():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    model[1].weight = model[0].weight
    adapter = da.attach(model, da.LoRA(rank=2), "linear")
    assert [site.name for site in adapter.sites] == ["0"]
    train(adapter)
    x, weight = torch.randn(3, 4).double(), adapter.adapted_weight("0")
    expected = (x @ weight.T + model[0].bias) @ weight.T + model[1].bias
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    da.merge(adapter)
    assert model[1].weight is model[0].weight
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    da.detach(adapter)
    assert type(model[0]) is type(model[1]) is nn.Linear


def test_a_merged_tied_weight_keeps_the_bias_of_each_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    biases = [layer.bias.clone() for layer in model]
    adapter = da.attach(model, da.LoRA(rank=2), "linear")
    train(adapter)
    x = torch.randn(3, 4)
    expected = model(x)
    da.merge(adapter)
    torch.testing.assert_close(model(x), expected)
    da.unmerge(adapter)
    assert all(torch.equal(layer.bias, bias) for layer, bias in zip(model, biases, strict=True))


REFUSED = {
    "target matching nothing": (denoiser, da.LoRA(), "atention", ValueError, "did you mean attention"),
    "exclusion matching nothing": (denoiser, da.LoRA(), "conv+!cnov_in", ValueError, "conv_in"),
    "no layer of the method's kinds": (denoiser, da.LoRA(), "norm", ValueError, "choose none"),
    "a layer named on purpose": (denoiser, da.LoRA(), "conv+ln", ValueError, "cannot change ln"),
    "an unknown type": (SelfAttention, da.LoRA(), "linear", TypeError, "out_proj"),
    "a method by name": (denoiser, "lora", "conv", (TypeError, ValueError), "make_method"),
}


@pytest.mark.parametrize(("make", "method", "targets", "kind", "said"), REFUSED.values(), ids=REFUSED)
def test_after_a_refusal_the_model_is_exactly_as_before(make, method, targets, kind, said):
    model = make()
    before = state(model)
    with pytest.raises(kind, match=said):
        da.attach(model, method, targets)
    assert state(model) == before


def test_what_is_neither_a_module_nor_a_pipeline_is_refused():
    with pytest.raises(TypeError, match="pipeline with a unet or transformer, got object"):
        da.attach(object(), da.LoRA(), "conv")


def test_one_name_twice_is_refused_and_the_first_adapter_goes_on():
    model, x = denoiser(), image()
    train(da.attach(model, da.LoRA(rank=2), "conv", name="cat"))
    before, expected = state(model), model(x)
    with pytest.raises(ValueError, match="already has an adapter named 'cat'"):
        da.attach(model, da.LoRA(rank=2), "attention", name="cat")
    assert state(model) == before
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), "1", None, True])
def test_a_strength_that_is_no_number_is_refused(strength):
    adapter = da.attach(denoiser(), da.LoRA(rank=2), "conv")
    with pytest.raises(ValueError, match="strength must be a finite number"):
        adapter.strength = strength
    assert adapter.strength == 1


def test_an_unknown_site_is_named_with_near_ones():
    adapter = da.attach(denoiser(), da.LoRA(rank=2), "conv")
    with pytest.raises(ValueError, match="no site 'conv_inn'; did you mean conv_in"):
        adapter.adapted_weight("conv_inn")


def test_a_method_that_fails_to_start_leaves_no_trace(monkeypatch):
    model = denoiser()
    before = state(model)
    monkeypatch.setattr(da.LoRA, "init_tensors", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        da.attach(model, da.LoRA(rank=2), "conv")
    assert state(model) == before


def test_disabled_restores_after_an_exception():
    model, x = denoiser(), image()
    adapter = da.attach(model, da.LoRA(rank=2), "conv")
    train(adapter)
    da.merge(adapter)
    before = model(x)
    with pytest.raises(KeyError), da.disabled(model):
        raise KeyError
    assert adapter.merged
    assert torch.equal(model(x), before)


def test_attaching_to_the_meta_device_counts_without_values():
    with torch.device("meta"):
        model = denoiser()
    adapter = da.attach(model, da.FLoRA(rank=2), "all")
    assert adapter.num_parameters > 0
    assert {parameter.device.type for parameter in adapter.parameters()} == {"meta"}
