"""Norms of torch and diffusers under adapters, against their formulas in float64."""

import copy
import pickle

import pytest
import torch
from helpers.layer_kinds import KINDS
from helpers.method_cases import Model, close, train
from safetensors.torch import save_file
from torch import nn

import diffadapt as da

RMS_NORMS = ("rms-norm", "diffusers-rms-norm", "diffusers-rms-norm-with-bias", "krea2-rms-norm")
NORMS = (*RMS_NORMS, "float32-layer-norm")
METHODS = ("norms", "difffit", "full")


def adapted(name, method="norms", dtype=torch.float32):
    if name not in KINDS:
        pytest.skip(f"the installed diffusers has no {name}")
    model = Model(KINDS[name].layer(dtype))
    bare = copy.deepcopy(model.layer)
    return model, da.attach(model, da.make_method(method), "norm"), bare


def formula(name, bare, x, weight, bias):
    """`x / sqrt(mean(x^2) + eps) * weight + bias`, of the deviations from the mean in a LayerNorm."""
    if name == "float32-layer-norm":
        x = x - x.mean(-1, keepdim=True)
    eps = torch.finfo(torch.float32).eps if bare.eps is None else bare.eps
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y * (1 + weight) if name == "krea2-rms-norm" else y * weight
    return y if bias is None else y + bias


@pytest.mark.parametrize("name", NORMS)
def test_output_and_gradients_are_those_of_the_formula(name):
    model, adapter, bare = adapted(name)
    train(adapter)
    x = KINDS[name].input().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    trained = dict(adapter.parts[0].tensors[0].items())
    change = {key: tensor.detach().double().requires_grad_() for key, tensor in trained.items()}
    exact_x = x.detach().double().requires_grad_()
    weight = bare.weight.detach().double() + change["weight"]
    bias = bare.bias.detach().double() + change["bias"] if "bias" in change else None
    expected = formula(name, bare, exact_x, weight, bias)
    expected.square().sum().backward()
    close(y, expected, 1e-6)
    close(x.grad, exact_x.grad, 1e-5)
    for key, tensor in trained.items():
        close(tensor.grad, change[key].grad, 1e-5)


@pytest.mark.parametrize("name", NORMS)
def test_norms_trains_the_weight_and_a_bias_where_there_is_one(name):
    _, adapter, bare = adapted(name)
    has_bias = getattr(bare, "bias", None) is not None
    assert adapter.num_parameters == (2 if has_bias else 1) * 8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NORMS)
def test_merging_saving_and_detaching(name, method, tmp_path):
    model, adapter, bare = adapted(name, method)
    train(adapter)
    x = KINDS[name].input()
    y = model(x)
    da.save(adapter, tmp_path / "norms.safetensors")
    da.merge(adapter)
    close(model(x), y, 1e-6)
    da.unmerge(adapter)
    assert torch.equal(model(x), y)
    da.detach(adapter)
    assert type(model.layer) is type(bare)
    assert torch.equal(model(x), bare(x))
    da.load(model, tmp_path / "norms.safetensors")
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("name", RMS_NORMS)
def test_weights_in_float32_beside_half_precision_activations_keep_type_and_bits(name):
    """Krea 2 keeps its norms in float32 whatever the rest of the model is in."""
    model, _, bare = adapted(name)
    x = KINDS[name].input(torch.bfloat16)
    assert model(x).dtype == bare(x).dtype
    assert torch.equal(model(x), bare(x))


@pytest.mark.parametrize("name", NORMS)
def test_adapted_norms_can_be_copied_and_pickled(name):
    model, adapter, _ = adapted(name)
    train(adapter)
    x = KINDS[name].input()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied.layer) is type(model.layer)
        assert torch.equal(copied(x), model(x))


def test_a_file_with_a_bias_for_a_norm_without_one_is_refused(tmp_path):
    path = tmp_path / "norms.safetensors"
    save_file({"layer.diff": torch.ones(8), "layer.diff_b": torch.ones(8)}, path)
    da.load(Model(nn.LayerNorm(8)), path)
    with pytest.raises(ValueError, match=r"layer has shape \(8,\), which a .* does not fit"):
        da.load(Model(nn.RMSNorm(8)), path)


def test_a_subclass_of_a_norm_is_refused():
    class Doubled(type(KINDS["diffusers-rms-norm"].make())):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match="Doubled, which cannot be adapted"):
        da.attach(Model(Doubled(8, eps=1e-6)), da.Norms(), "layer")


def test_the_target_norm_chooses_them_all():
    model = nn.Sequential(
        *[KINDS[name].make() for name in (*NORMS, "layer-norm", "group-norm") if name in KINDS]
    )
    assert len(da.attach(model, da.Norms(), "norm").sites) == len(model)


@pytest.mark.parametrize("name", ["rms-norm", "diffusers-rms-norm"])
def test_pefts_copies_of_norms_are_merged(name):
    model, adapter, _ = adapted(name, "peft:LN_TUNING")
    train(adapter)
    x = KINDS[name].input()
    y = model(x)
    da.merge(adapter)
    close(model(x), y, 1e-6)
