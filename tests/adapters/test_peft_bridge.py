"""PEFT's methods through our own calls: attach, save, load, merge, strength, disabled, detach."""

import sys

import pytest
import torch
from helpers.models import denoiser, image, pipeline, state
from helpers.perturb import perturb

import diffadapt as da

pytest.importorskip("peft")

METHODS = {
    "AdaLoRA": "peft:ADALORA(init_r=3, target_r=2, total_step=100)",
    "OFT": "peft:OFT(r=2, oft_block_size=0)",
    "HiRA": "peft:HIRA(r=2)",
    "LoRA": "peft:LORA(r=2, lora_alpha=3)",
    "VeRA": "peft:VERA(r=4)",
}


@torch.no_grad()
def run(model):
    return model.eval()(image())


def attached(method, seed=0):
    model = denoiser()
    return model, perturb(da.attach(model, da.make_method(METHODS[method]), "attention", seed=seed))


@pytest.mark.parametrize("method", METHODS)
def test_attaching_changes_no_output_and_detaching_gives_the_bare_model(method):
    model = denoiser()
    before, output = state(model), run(model)
    adapter = da.attach(model, da.make_method(METHODS[method]), "attention")
    assert torch.allclose(run(model), output, atol=1e-6)
    assert adapter.num_parameters > 0
    perturb(adapter)
    assert not torch.allclose(run(model), output, atol=1e-3)
    da.detach(adapter)
    assert torch.equal(run(model), output)
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in denoiser().named_parameters()
    ]
    assert [row[:2] for row in state(model)] == [row[:2] for row in before]


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_gives_the_same_outputs_in_a_new_model(tmp_path, method):
    model, adapter = attached(method)
    da.save(adapter, tmp_path / "a.safetensors", base="tiny")
    again = denoiser()
    loaded = da.load(again, tmp_path / "a.safetensors")
    assert torch.equal(run(again), run(model))
    assert loaded.num_parameters == adapter.num_parameters
    assert da.read_metadata(tmp_path / "a.safetensors")["adapter"]["method"][0]["name"].startswith("peft:")


@pytest.mark.parametrize("method", METHODS)
def test_merging_is_exact_and_unmerging_restores_bits(method):
    model, adapter = attached(method)
    live = run(model)
    weights = [layer_state.base().clone() for layer_state in adapter.layer_states.values()]
    da.merge(adapter)
    assert torch.allclose(run(model), live, atol=1e-5)
    da.unmerge(adapter)
    assert torch.equal(run(model), live)
    for weight, layer_state in zip(weights, adapter.layer_states.values(), strict=True):
        assert torch.equal(weight, layer_state.base())


class Whole:
    """Part of a model; a copy of it is a copy of the model."""

    def __deepcopy__(self, memo):
        raise AssertionError("the whole model is copied")


@pytest.mark.parametrize("method", METHODS)
def test_merging_copies_a_layer_at_a_time_never_the_model(method):
    model, adapter = attached(method)
    model.whole = Whole()
    da.merge(adapter)
    da.unmerge(adapter)


@pytest.mark.parametrize("method", METHODS)
def test_strength_goes_from_the_base_to_the_adapter(method):
    model, adapter = attached(method)
    base = run(denoiser())
    weight = adapter.layer_states["blocks.0.to_q"].base().clone()
    full = adapter.adapted_weight("blocks.0.to_q")
    adapter.strength = 0.25
    half = adapter.adapted_weight("blocks.0.to_q")
    assert torch.allclose(half - weight, 0.25 * (full - weight), atol=1e-6)
    live = run(model)
    da.merge(adapter)
    assert torch.allclose(run(model), live, atol=1e-5)
    da.unmerge(adapter)
    adapter.strength = 0
    assert torch.equal(run(model), base)
    adapter.strength = 1
    with da.disabled(model):
        assert torch.equal(run(model), base)


def test_only_the_adapter_trains():
    model, adapter = attached("OFT")
    model.train()(image()).square().sum().backward()
    owned = {id(parameter) for parameter in adapter.parameters()}
    for parameter in model.parameters():
        assert (parameter.grad is not None) <= (id(parameter) in owned)
    assert any(parameter.grad is not None for parameter in adapter.parameters())


def test_a_pipeline_with_its_text_encoder_is_one_adapter_and_one_file(tmp_path):
    pipe, again = pipeline(), pipeline()
    method = da.make_method("peft:LORA(r=2)")
    adapter = perturb(da.attach(pipe, method, "attention", text_encoder_targets="attention"))
    assert {site.name.split(".")[0] for site in adapter.sites} == {"unet", "text_encoder"}
    da.save(adapter, tmp_path / "a.safetensors")
    da.load(again, tmp_path / "a.safetensors")
    assert torch.equal(again.unet(image()), pipe.unet(image()))
    assert torch.equal(again.text_encoder(torch.ones(1, 6)), pipe.text_encoder(torch.ones(1, 6)))
    da.detach(adapter)
    assert torch.equal(pipe.unet(image()), pipeline().unet(image()))


def test_the_seed_decides_the_start():
    def start(seed):
        adapter = da.attach(denoiser(), da.make_method("peft:LORA(r=2)"), "attention", seed=seed)
        return torch.cat([p.flatten() for p in adapter.parameters() if p.requires_grad])

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("peft:NOSUCH", "no type 'NOSUCH'"),
        ("peft:OFT(rr=2)", "no option 'rr'"),
        ("peft:OFT(2)", "peft:OFT"),
        ("peft:OFT(r=2", "peft:OFT"),
    ],
)
def test_mistakes_are_named(text, said):
    with pytest.raises(ValueError, match=said):
        da.make_method(text)


def test_the_rank_of_a_script_is_pefts_r():
    assert da.make_method("peft:LORA", rank=3).options == {"r": 3}


def test_a_layer_peft_cannot_change_leaves_the_model_as_it_was():
    model = denoiser()
    before = state(model)
    with pytest.raises(ValueError):  # noqa: PT011 (PEFT's own words)
        da.attach(model, da.make_method("peft:LORA(r=2)"), ["to_q", "norm"])
    assert [row[:2] for row in state(model)] == [row[:2] for row in before]
    assert da.attached(model) == {}


def test_a_file_with_another_tensor_is_refused_and_the_model_is_as_before(tmp_path):
    from safetensors.torch import load_file, save_file

    from diffadapt.common.safetensors_file import checksums, read_header

    _, adapter = attached("LoRA")
    path = tmp_path / "a.safetensors"
    da.save(adapter, path)
    tensors = load_file(path) | {"peft:LORA/extra": torch.ones(1)}
    save_file(tensors, path, read_header(path) | checksums(tensors, read_header(path)["adapter"]))
    model = denoiser()
    before = state(model)
    with pytest.raises(ValueError, match="extra"):
        da.load(model, path)
    assert [row[:2] for row in state(model)] == [row[:2] for row in before]


def test_without_peft_the_remedy_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft.mapping", None)
    with pytest.raises(ImportError, match="pip install peft"):
        da.make_method("peft:OFT(r=2)")


@pytest.mark.parametrize("method", ["RANDLORA(r=2)", "LILY(r=2)", "SHIRA(r=2)"])
def test_a_method_whose_tensors_no_file_can_hold_is_refused_at_attach(method):
    model = denoiser()
    before = state(model)
    with pytest.raises(ValueError, match="could not be saved after training"):
        da.attach(model, da.make_method(f"peft:{method}"), "attention")
    assert [row[:2] for row in state(model)] == [row[:2] for row in before]
    assert da.attached(model) == {}


MERGED_OTHERWISE = {
    "OFT(r=2, oft_block_size=0)": torch.nn.Conv2d(8, 8, 3),
    "LORA(r=2)": torch.nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    "LOHA(r=2)": torch.nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
    "BOFT": torch.nn.Conv2d(8, 8, 3, dilation=2, padding=1),
    "ADALORA(init_r=3, target_r=2, total_step=100)": torch.nn.Conv2d(8, 8, 3, groups=2),
}


@pytest.mark.parametrize("method", MERGED_OTHERWISE)
def test_a_merge_that_is_not_the_forward_is_refused_at_attach(method):
    model = torch.nn.Sequential(MERGED_OTHERWISE[method])
    output = model(torch.ones(1, 8, 9, 9))
    with pytest.raises(ValueError, match="exclude it with '!0'"):
        da.attach(model, da.make_method(f"peft:{method}"), "conv")
    assert da.attached(model) == {}
    assert torch.equal(model(torch.ones(1, 8, 9, 9)), output)


def test_pefts_copies_of_norms_are_merged():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.GroupNorm(2, 8))
    adapter = perturb(da.attach(model, da.make_method("peft:LN_TUNING"), "norm"))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    live = model(x)
    weight = adapter.layer_states["1"].base().clone()
    assert not torch.equal(adapter.adapted_weight("1"), weight)
    da.merge(adapter)
    assert torch.allclose(model(x), live, atol=1e-6)
    da.unmerge(adapter)
    assert torch.equal(model(x), live)
    assert torch.equal(adapter.layer_states["1"].base(), weight)
