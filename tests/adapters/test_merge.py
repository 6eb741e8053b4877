"""Folding several adapters into a whole model, in every order, and what half precision loses."""

import copy
import itertools

import pytest
import torch
from helpers.method_cases import train
from helpers.models import denoiser, image

import diffadapt as da


@pytest.fixture
def three():
    model = denoiser().double()
    bare = copy.deepcopy(model)
    adapters = []
    for seed, (method, targets) in enumerate(
        [(da.LoRA(rank=2), "all"), (da.FLoRA(rank=3), "conv"), (da.LoRA(rank=1), "attention")]
    ):
        adapters.append(da.attach(model, method, targets, name=str(seed), seed=seed))
        train(adapters[-1], seed=seed)
        adapters[-1].strength = 0.5 + seed
    return model, bare, adapters


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_three_adapters_merge_in_any_order_and_leave_in_the_order_they_came(three, order):
    model, bare, adapters = three
    x = image().double()
    expected = model(x)
    for which in order:
        da.merge(adapters[which])
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    for which in order:
        da.unmerge(adapters[which])
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(value, bare.state_dict()[key]) for key, value in model.state_dict().items())


def test_the_resident_weight_depends_on_what_is_merged_not_on_the_order(three):
    model, _, adapters = three
    weights = []
    for order in itertools.permutations(adapters):
        for adapter in order:
            da.merge(adapter)
        weights.append(model.conv_in.weight.clone())
        for adapter in order:
            da.unmerge(adapter)
    assert all(torch.equal(weight, weights[0]) for weight in weights)


def test_merging_and_unmerging_twice_is_the_same_as_once(three):
    model, bare, (adapter, *_) = three
    da.merge(adapter)
    weight = model.conv_in.weight.clone()
    da.merge(adapter)
    assert torch.equal(model.conv_in.weight, weight)
    da.unmerge(adapter)
    da.unmerge(adapter)
    assert torch.equal(model.conv_in.weight, bare.conv_in.weight)


def test_a_merged_model_saves_its_merged_weights_under_the_bare_names(three):
    model, bare, (adapter, *_) = three
    da.merge(adapter)
    assert model.state_dict().keys() == bare.state_dict().keys()
    weight = adapter.adapted_weight("conv_in")
    assert torch.equal(model.state_dict()["conv_in.weight"], weight)


def test_merging_keeps_the_parameter_objects_that_others_hold(three):
    model, _, (adapter, *_) = three
    held = dict(model.named_parameters())
    da.merge(adapter)
    da.unmerge(adapter)
    assert all(parameter is held[name] for name, parameter in model.named_parameters())


def test_adapted_weight_is_the_same_before_while_and_after_merging(three):
    _, _, adapters = three
    before = [adapter.adapted_weight(adapter.sites[0]) for adapter in adapters]
    for adapter in adapters:
        da.merge(adapter)
    while_merged = [adapter.adapted_weight(adapter.sites[0]) for adapter in adapters]
    assert all(torch.equal(a, b) for a, b in zip(before, while_merged, strict=True))


def test_a_merged_models_base_cannot_drift_over_a_hundred_rounds():
    model = denoiser().bfloat16()
    bare = copy.deepcopy(model)
    adapter = da.attach(model, da.LoRA(rank=2), "all")
    for round_ in range(100):
        train(adapter, seed=round_)
        da.merge(adapter)
        da.unmerge(adapter)
    assert all(torch.equal(value, bare.state_dict()[key]) for key, value in model.state_dict().items())


def test_the_share_lost_in_half_precision_is_all_of_a_change_below_the_spacing():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False)).bfloat16()
    torch.nn.init.ones_(model[0].weight)
    adapter = da.attach(model, da.LoRA(rank=1), "0")
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.fill_(1e-2)  # a change of 1e-4 beside a spacing of 2^-7
    assert da.merge(adapter) == pytest.approx(1.0)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.fill_(1.0)  # 1 + 1 is exact
    assert da.merge(adapter) == 0.0


def test_values_trained_while_merged_reach_the_weight_at_the_next_merge(three):
    model, _, (adapter, *_) = three
    da.merge(adapter)
    train(adapter, seed=9)
    da.merge(adapter)
    assert torch.equal(model.conv_in.weight, adapter.adapted_weight("conv_in"))


def test_merging_in_channels_last_keeps_the_memory_format():
    model = denoiser().to(memory_format=torch.channels_last)
    adapter = da.attach(model, da.LoRA(rank=2), "conv")
    train(adapter)
    stride = model.conv_in.weight.stride()
    da.merge(adapter)
    assert model.conv_in.weight.stride() == stride
    da.unmerge(adapter)
    assert model.conv_in.weight.stride() == stride


def test_other_weights_can_be_put_under_an_adapter_but_not_over_a_merged_one(three):
    model, bare, (adapter, *_) = three
    other = {name: value + 0.01 for name, value in bare.state_dict().items()}
    fresh = copy.deepcopy(bare)
    fresh.load_state_dict(other)
    moved = da.attach(fresh, da.LoRA(rank=2), "all", seed=0)
    train(moved, seed=0)
    moved.strength, x = adapter.strength, image().double()
    for further in three[2][1:]:
        further.strength = 0
    assert torch.equal(torch.func.functional_call(model, other, (x,)), fresh(x))
    da.merge(adapter)
    with pytest.raises(ValueError, match=r"conv_in holds a merged adapter.*unmerge, load, merge"):
        model.load_state_dict(other)
    da.unmerge(adapter)
    assert all(torch.equal(value, bare.state_dict()[key]) for key, value in model.state_dict().items())
    model.load_state_dict(other)
    torch.testing.assert_close(model(x), fresh(x), rtol=1e-12, atol=1e-12)
