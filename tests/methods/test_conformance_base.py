"""The laws of the untouched base, precision, and copies, for every registered method."""

import copy
import io
import pickle

import pytest
import torch
from helpers.layer_kinds import FEW
from helpers.method_cases import Model, adapt, close, pairs, plain, train, trainable
from torch import nn

import diffadapt as da

on_few = pytest.mark.parametrize(**pairs(kinds=FEW))


@on_few
def test_the_base_keeps_its_names_type_and_values(case, kind):
    model, adapter, bare = adapt(case, kind)
    original = Model(bare)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in original.named_parameters()]
    assert [name for name, _ in model.named_modules()] == [name for name, _ in original.named_modules()]
    assert model.state_dict().keys() == original.state_dict().keys()
    assert isinstance(model.layer, type(bare))
    assert all(torch.equal(value, original.state_dict()[key]) for key, value in model.state_dict().items())
    da.merge(adapter)
    da.unmerge(adapter)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in original.named_parameters()]


@on_few
def test_only_adapter_tensors_are_trained_and_all_are_float32(case, kind):
    model, adapter, _ = adapt(case, kind, torch.bfloat16)
    model(kind.input(torch.bfloat16)).float().square().sum().backward()
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    trained = trainable(adapter)
    assert trained
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())
    assert all(parameter.grad.dtype == torch.float32 for parameter in trained if parameter.grad is not None)
    assert adapter.num_parameters == sum(parameter.numel() for parameter in trained)


@on_few
def test_trained_tensors_are_float64_on_a_float64_base(case, kind):
    _, adapter, _ = adapt(case, kind, torch.float64)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float64}


@on_few
def test_changing_the_precision_of_the_model_leaves_the_adapter_alone(case, kind):
    model, adapter, _ = adapt(case, kind)
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    both = nn.ModuleList([model, adapter])  # as in the module that a training loop wraps
    for change in (model.bfloat16, model.half, model.double, both.bfloat16, both.double):
        change()
        for name, tensor in adapter.state_dict().items():
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])


@on_few
def test_a_model_moved_to_half_precision_still_runs_and_merges(case, kind):
    model, adapter, bare = adapt(case, kind)
    da.merge(adapter)
    model.to(torch.bfloat16)
    da.unmerge(adapter)
    bare = bare.to(torch.bfloat16)
    assert torch.equal(model.layer.weight, bare.weight)
    x = kind.input(torch.bfloat16)
    expected = plain(bare, x.double() if not kind.rows else x, *_exact(adapter))
    assert model(x).dtype == torch.bfloat16
    close(model(x), expected, 2**-5)


@on_few
def test_a_pickled_model_and_a_deep_copy_compute_the_same_bits(case, kind):
    model, adapter, _ = adapt(case, kind)
    x = kind.input()
    expected = model(x)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), _saved_and_loaded(model)):
        assert torch.equal(other(x), expected)
        assert type(other.layer) is type(model.layer)
        (own,) = da.attached(other).values()
        assert own is not adapter
        train(own, seed=5)
        assert not torch.equal(other(x), expected)
        assert torch.equal(model(x), expected)


def _saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(**pairs(kinds=("linear", "conv-3x3", "conv-groups-2", "conv-padding-circular")))
def test_a_small_update_of_a_half_precision_base_is_not_rounded_away(case, kind):
    # The base's second half of inputs cancels its first: only the update's output is left.
    layer = kind.layer(torch.bfloat16)
    half = layer.weight.shape[1] // 2
    x = kind.input(torch.bfloat16)
    channels = x.unflatten(-1 if x.dim() == 2 else 1, (-1, 2, half))
    axis = channels.dim() - 2 if x.dim() == 2 else 2
    first, _ = channels.unbind(axis)
    x = torch.stack([2 * first, -first], axis).reshape(x.shape)
    with torch.no_grad():
        layer.weight[:, half:] = 2 * layer.weight[:, :half]
        if layer.bias is not None:
            layer.bias.zero_()
    model, bare = Model(layer), copy.deepcopy(layer)
    adapter = da.attach(model, case.method, "layer")
    train(adapter, 1e-3)
    weight, bias = _exact(adapter)
    expected = plain(bare, x.double(), weight, bias)
    error = (model(x).double() - expected).abs().max()
    assert error <= 0.03 * expected.abs().max() + 1e-6
    assert (weight - bare.weight).abs().max() < 0.05 * bare.weight.abs().max(), "the update should be small"


@on_few
def test_merging_into_half_precision_reports_the_share_lost(case, kind):
    model, adapter, bare = adapt(case, kind, torch.bfloat16)
    weight = adapter.adapted_weight("layer")
    lost = da.merge(adapter)
    assert torch.equal(model.layer.weight, weight.to(torch.bfloat16))
    change = (weight - bare.weight).norm()
    if change > 0:
        assert lost == pytest.approx(((weight - model.layer.weight).norm() / change).item(), rel=1e-4)


def _exact(adapter):
    weight, bias = adapter.adapted_weight("layer"), adapter.adapted_bias("layer")
    return weight.double(), None if bias is None else bias.double()
