"""The laws of outputs and weights, for every registered method on every kind of layer it can change."""

import itertools

import pytest
import torch
from helpers.layer_kinds import FEW, KINDS
from helpers.method_cases import FIRST, adapt, close, pairs, plain, train, trainable
from torch import nn

import diffadapt as da

everything = pytest.mark.parametrize(**pairs())
on_few = pytest.mark.parametrize(**pairs(kinds=FEW))


def test_every_registered_method_changes_some_kind_of_layer():
    for case in FIRST:
        assert any(case.changes(kind) for kind in KINDS.values()), case


@everything
def test_attaching_changes_no_output_bit(case, kind):
    model, _, bare = adapt(case, kind, trained=False)
    x = kind.input()
    if case.starts_exactly:
        assert torch.equal(model(x), bare(x))
    else:
        close(model(x), bare(x), 1e-6)


@on_few
def test_attaching_changes_no_output_bit_of_a_half_precision_base(case, kind):
    model, _, bare = adapt(case, kind, torch.bfloat16, trained=False)
    x = kind.input(torch.bfloat16)
    assert model(x).dtype == bare(x).dtype
    if case.starts_exactly:
        assert torch.equal(model(x), bare(x))
    else:
        close(model(x), bare(x), 2**-7)


@on_few
def test_attaching_changes_neither_dtype_nor_bits_under_autocast(case, kind):
    model, _, bare = adapt(case, kind, trained=False)
    with torch.autocast("cpu", torch.bfloat16):
        value, expected = model(kind.input()), bare(kind.input())
    assert value.dtype == expected.dtype
    if case.starts_exactly:
        assert torch.equal(value, expected)
    else:
        close(value, expected, 2**-7)


@on_few
def test_a_trained_adapter_runs_under_autocast_as_in_float32(case, kind):
    model, _, _ = adapt(case, kind)
    expected = model(kind.input())
    with torch.autocast("cpu", torch.bfloat16):
        value = model(kind.input())
    close(value, expected, 0.05)
    value.float().square().sum().backward()


@everything
def test_the_forward_is_the_layer_with_the_adapted_weight_and_bias(case, kind):
    _assert_forward_is_merge(case, kind, torch.float64, 1e-10)


@on_few
def test_the_forward_is_the_layer_with_the_adapted_weight_and_bias_in_float32(case, kind):
    _assert_forward_is_merge(case, kind, torch.float32, 1e-5)


def _assert_forward_is_merge(case, kind, dtype, tolerance):
    model, adapter, bare = adapt(case, kind, dtype)
    x = kind.input(dtype)
    weight, bias = adapter.adapted_weight("layer"), adapter.adapted_bias("layer")
    assert weight.dtype == dtype
    assert weight.shape == bare.weight.shape
    close(model(x), plain(bare, x, weight, bias), tolerance)


@on_few
def test_trained_values_change_the_output(case, kind):
    model, _, bare = adapt(case, kind)
    x = kind.input()
    assert (model(x) - bare(x)).abs().max() > 1e-4 * bare(x).abs().max()


@on_few
def test_the_adapted_weight_follows_values_changed_after_a_forward(case, kind):
    model, adapter, _ = adapt(case, kind)
    model(kind.input()).sum().backward()
    train(adapter, seed=8)
    weight = adapter.adapted_weight("layer")
    model(kind.input())
    assert torch.equal(weight, adapter.adapted_weight("layer"))


@on_few
def test_merging_keeps_the_outputs_and_unmerging_the_bits(case, kind):
    model, adapter, bare = adapt(case, kind, torch.float64)
    x = kind.input(torch.float64)
    expected = model(x)
    assert da.merge(adapter) == 0.0
    close(model(x), expected, 1e-10)
    assert torch.equal(model.layer.weight, adapter.adapted_weight("layer"))
    da.unmerge(adapter)
    _assert_bits(model.layer, bare)
    assert torch.equal(model(x), expected)


@on_few
def test_detaching_a_merged_adapter_gives_the_bare_layer_back(case, kind):
    model, adapter, bare = adapt(case, kind)
    da.merge(adapter)
    da.detach(adapter)
    _assert_bits(model.layer, bare)
    assert type(model.layer) is type(bare)
    assert model.layer.__dict__.keys() == bare.__dict__.keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(kind.input()), bare(kind.input()))


@on_few
def test_two_adapters_merge_and_unmerge_in_every_order(case, kind):
    model, first, bare = adapt(case, kind, torch.float64)
    second = da.attach(model, case.method, "layer", name="second", seed=1)
    train(second, seed=4)
    second.strength = 0.5
    x = kind.input(torch.float64)
    both = model(x)
    for merged in itertools.permutations((first, second)):
        for unmerged in itertools.permutations((first, second)):
            for adapter in merged:
                da.merge(adapter)
                close(model(x), both, 1e-10)
            for adapter in unmerged:
                da.unmerge(adapter)
                close(model(x), both, 1e-10)
            _assert_bits(model.layer, bare)
            assert torch.equal(model(x), both)


@on_few
def test_detaching_one_of_two_merged_adapters_leaves_the_other(case, kind):
    model, first, bare = adapt(case, kind)
    alone = model(kind.input())
    merged_alone = first.adapted_weight("layer")
    second = da.attach(model, case.method, "layer", name="second", seed=1)
    train(second, seed=4)
    da.merge(first)
    da.merge(second)
    da.detach(second)
    assert torch.equal(model.layer.weight, merged_alone)
    da.unmerge(first)
    _assert_bits(model.layer, bare)
    assert torch.equal(model(kind.input()), alone)


@on_few
def test_strength_interpolates_weight_bias_and_output(case, kind):
    model, adapter, bare = adapt(case, kind, torch.float64)
    x, base, base_bias = kind.input(torch.float64), bare.weight, getattr(bare, "bias", None)
    weight, bias = adapter.adapted_weight("layer"), adapter.adapted_bias("layer")
    if bias is not None and base_bias is None:
        base_bias = torch.zeros_like(bias)
    for strength in (-0.5, 0.3, 1, 2):
        adapter.strength = strength
        expected = base + strength * (weight - base)
        expected_bias = None if bias is None else base_bias + strength * (bias - base_bias)
        close(adapter.adapted_weight("layer"), expected, 1e-12)
        if bias is not None:
            close(adapter.adapted_bias("layer"), expected_bias, 1e-12)
        close(model(x), plain(bare, x, expected, expected_bias), 1e-10)


@on_few
def test_strength_zero_gives_the_bits_of_the_base(case, kind):
    model, adapter, bare = adapt(case, kind)
    adapter.strength = 0
    assert torch.equal(adapter.adapted_weight("layer"), bare.weight)
    with torch.no_grad():
        trainable(adapter)[0].view(-1)[0] = float("nan")  # skipped, not multiplied by zero
    assert torch.equal(model(kind.input()), bare(kind.input()))
    trainable(adapter)[0].data.nan_to_num_()
    da.merge(adapter)
    assert torch.equal(model.layer.weight, bare.weight)


@on_few
def test_strength_of_a_merged_adapter_changes_the_resident_weight(case, kind):
    model, adapter, bare = adapt(case, kind)
    da.merge(adapter)
    adapter.strength = 0.5
    assert torch.equal(model.layer.weight, adapter.adapted_weight("layer"))
    adapter.strength = 0
    assert torch.equal(model.layer.weight, bare.weight)
    assert torch.equal(model(kind.input()), bare(kind.input()))


@on_few
def test_disabled_gives_the_bits_of_the_base_and_restores_what_was(case, kind):
    model, adapter, bare = adapt(case, kind)
    x = kind.input()
    adapter.strength = 0.7
    for prepare in (lambda: None, lambda: da.merge(adapter)):
        prepare()
        before = model(x)
        with da.disabled(model):
            assert torch.equal(model(x), bare(x))
        assert adapter.strength == 0.7
        assert torch.equal(model(x), before)


def _assert_bits(layer: nn.Module, bare: nn.Module) -> None:
    own, expected = layer.state_dict(), bare.state_dict()
    assert own.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(own[key], value), key
