"""The laws of methods on quantised layers, for every registered method on every kind that adapters know."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.method_cases import CASES, FIRST, Case, Model, close, train, trainable
from helpers.quantised_kinds import (
    IN,
    OUT,
    QUANTISED,
    count_dequantisations,
    dequantised,
    needs,
    stored_values,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import diffadapt as da
from diffadapt.methods.site import Site

QUICK = "bnb-nf4"
# the methods whose changes do not depend on the weight
ADDITIVE = ("lora", "flora", "loha", "lokr", "superlora", "vera", "mora", "1lora", "bitfit", "gamma")


class Checkpointed(Model):
    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False)


def changes(case, kind):
    """Whether the method changes such a layer, were it not quantised."""
    site = Site("layer", "linear", (OUT, IN), 1, kind.has_bias)
    return all(
        site.kind in part.kinds and part.supports(site) and not part.trains_whole_weights
        for part in case.method.members
    )


def pairs(cases=CASES, kinds=tuple(QUANTISED)):
    """Arguments of `parametrize`: the first options of every method on all kinds, the others on one."""
    parameters = []
    for case, name in itertools.product(cases, kinds):
        kind = QUANTISED[name]
        if not changes(case, kind) or (case not in FIRST and name != QUICK):
            continue
        marks = [needs(kind)]
        if case not in FIRST or name != QUICK:
            marks.append(pytest.mark.slow)
        parameters.append(pytest.param(case, kind, marks=marks, id=f"{case}-{name}"))
    return {"argnames": ("case", "kind"), "argvalues": parameters}


every = pytest.mark.parametrize(**pairs())
first = pytest.mark.parametrize(**pairs(FIRST))


def adapt(case, kind, *, trained=True, model=Model):
    net = model(kind.layer())
    bare = _twin(net.layer)
    adapter = da.attach(net, case.method, "layer")
    if trained:
        train(adapter)
    return net, adapter, bare


def _twin(layer):
    """A second module with the same tensors, which `attach` does not see."""
    twin = type(layer).__new__(type(layer))
    twin.__dict__ = dict(layer.__dict__)
    return twin


def on_dequantised(case, layer, adapter):
    """The same adapter on a plain layer with the dequantised weight."""
    model = Model(dequantised(layer))
    other = da.attach(model, case.method, "layer")
    with torch.no_grad():
        for parameter, value in zip(other.parameters(), adapter.parameters(), strict=True):
            parameter.copy_(value)
    return model, other


@every
def test_attaching_changes_no_output_bit_and_detaching_no_stored_bit(case, kind):
    x = kind.input()
    before = stored_values(kind.layer())
    model, adapter, bare = adapt(case, kind, trained=False)
    expected = bare(x)
    if case.starts_exactly:
        assert torch.equal(model(x), expected)
    else:
        close(model(x), expected, 1e-6)
    train(adapter)
    model(x).square().sum().backward()
    da.detach(adapter)
    assert type(model.layer) is type(bare)
    assert "_diffadapt" not in model.layer.__dict__
    assert torch.equal(model(x), expected)
    after = stored_values(model.layer)
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@every
def test_the_output_is_that_of_the_adapted_weight(case, kind):
    model, adapter, bare = adapt(case, kind)
    x = kind.input()
    weight, bias = adapter.adapted_weight("layer"), adapter.adapted_bias("layer")
    close(model(x), F.linear(x, weight, bias), kind.tolerance())
    assert (model(x) - bare(x)).abs().max() > 1e-4 * bare(x).abs().max()


@every
def test_outputs_and_gradients_are_those_on_the_dequantised_base(case, kind):
    model, adapter, bare = adapt(case, kind)
    plain, other = on_dequantised(case, bare, adapter)
    x, plain_x = kind.input().requires_grad_(), kind.input().requires_grad_()
    y, expected = model(x), plain(plain_x)
    close(y, expected, kind.tolerance())
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    (y * slope).sum().backward()
    (expected * slope).sum().backward()
    close(x.grad, plain_x.grad, 1e-4 if kind.rounds_input else 1e-5)
    for own, reference in zip(trainable(adapter), trainable(other), strict=True):
        close(own.grad, reference.grad, kind.tolerance(2e-5))


@first
def test_gradients_are_the_same_under_checkpointing(case, kind):
    gradients = []
    for model_class in (Model, Checkpointed):
        model, adapter, _ = adapt(case, kind, model=model_class)
        x = kind.input().requires_grad_()
        model(x).square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in trainable(adapter))])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize(**pairs([Case(spec) for spec in (*ADDITIVE, "lora+flora", "lora+bitfit")], [QUICK]))
def test_additive_methods_never_dequantise(case, kind, monkeypatch):
    _assert_never_dequantised(case, kind, monkeypatch)


@pytest.mark.parametrize(**pairs([case for case in FIRST if case.spec in ADDITIVE]))
def test_additive_methods_never_dequantise_on_any_kind(case, kind, monkeypatch):
    _assert_never_dequantised(case, kind, monkeypatch)


def _assert_never_dequantised(case, kind, monkeypatch):
    calls = count_dequantisations(monkeypatch)
    model, _, _ = adapt(case, kind)
    model(kind.input()).square().sum().backward()
    assert calls == []
    model(kind.input().requires_grad_()).square().sum().backward()
    assert len(calls) == 1  # for the gradient of the input, as the bare layer's own backward


@pytest.mark.parametrize("name", ["bnb-nf4", "torchao-int8", "torchao-float8", "gguf-q8"])
@pytest.mark.parametrize("spec", ["pissa(rank=2)", "dora(rank=2)"])
def test_pissa_and_dora_dequantise_at_their_start_alone(spec, name, monkeypatch):
    kind = QUANTISED[name]
    calls = count_dequantisations(monkeypatch)
    model, _, _ = adapt(Case(spec), kind)
    assert len(calls) == 1
    model(kind.input()).square().sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("order", ["first", "exp"])
def test_liera_dequantises_in_forward_and_again_in_backward(order, monkeypatch):
    kind = QUANTISED[QUICK]
    calls = count_dequantisations(monkeypatch)
    model, _, _ = adapt(Case("liera", {"rank": 2, "order": order}), kind)
    assert calls == []
    loss = model(kind.input()).square().sum()
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2


@first
def test_no_dense_weight_is_kept_for_backward(case, kind):
    model, adapter, _ = adapt(case, kind)
    x = torch.randn(2, IN, requires_grad=True)
    own = [x, *adapter.parameters(), *adapter.buffers()]
    ignored = {tensor.untyped_storage()._cdata for tensor in own}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in ignored:
            kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    assert sum(storage.nbytes() for storage in kept.values()) < 4 * IN * OUT / 2


@first
def test_two_adapters_add_up_by_their_strengths(case, kind):
    model, adapter, bare = adapt(case, kind)
    x = kind.input()
    start, alone = bare(x), model(x)
    adapter.strength = 0.5
    close(model(x), start + 0.5 * (alone - start), 1e-5)
    second = da.attach(model, da.LoRA(rank=2), "layer", name="second")
    train(second, seed=4)
    adapter.strength = 0
    lora = model(x)
    adapter.strength = 0.5
    close(model(x), lora + 0.5 * (alone - start), 1e-5)
    with da.disabled(model):
        assert torch.equal(model(x), start)
    da.detach(adapter)
    assert torch.equal(model(x), lora)
    da.detach(second)
    assert type(model.layer) is type(bare)


@first
def test_a_saved_adapter_is_the_same_on_the_quantised_base(case, kind, tmp_path):
    model, adapter, _ = adapt(case, kind)
    expected = model(kind.input())
    da.save(adapter, tmp_path / "a.safetensors")
    again = Model(kind.layer())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        da.load(again, tmp_path / "a.safetensors", strict_base=True)
    assert torch.equal(again(kind.input()), expected)


@first
def test_autocast_and_half_precision_inputs_start_as_the_bare_layer(case, kind):
    model, adapter, bare = adapt(case, kind, trained=False)
    with torch.autocast("cpu", torch.bfloat16):
        expected, value = bare(kind.input()), model(kind.input())
        assert value.dtype == expected.dtype
        close(value, expected, 0 if case.starts_exactly else 2**-7)
        train(adapter)
        model(kind.input().requires_grad_()).float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in trainable(adapter))


@first
def test_layers_in_half_precision_start_as_they_are_and_train(case, kind):
    model = Model(kind.layer(torch.bfloat16))
    bare, x = _twin(model.layer), kind.input(torch.bfloat16)
    adapter = da.attach(model, case.method, "layer")
    expected, value = bare(x), model(x)
    assert value.dtype == torch.bfloat16
    close(value, expected, 0 if case.starts_exactly else 2**-7)
    train(adapter, 0.1)
    weight, bias = adapter.adapted_weight("layer"), adapter.adapted_bias("layer")
    x = x.requires_grad_()
    y = model(x)
    close(y.detach(), F.linear(x.detach().float(), weight, None if bias is None else bias.float()), 0.03)
    y.float().square().sum().backward()
    assert x.grad.isfinite().all()
    for parameter in trainable(adapter):
        assert parameter.grad.dtype == parameter.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@needs(QUANTISED["bnb-nf4"])
def test_reading_a_weight_does_not_choose_the_precision_of_its_layer():
    """bitsandbytes computes in the precision of the first input where none was set."""
    layer = QUANTISED["bnb-nf4"].layer(torch.bfloat16)
    layer.compute_dtype, layer.compute_type_is_set = None, False
    model = Model(layer)
    adapter = da.attach(model, da.make_method("dora(rank=2)"), "layer")
    adapter.adapted_weight("layer")
    assert layer.compute_dtype is None
    model(torch.ones(2, IN, dtype=torch.bfloat16))
    assert layer.compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    **pairs([Case("lora", {"rank": 2}), Case("dora", {"rank": 2})], [k for k in QUANTISED if "gguf" not in k])
)
def test_copies_compute_the_same_bits(case, kind):
    model, adapter, _ = adapt(case, kind)
    expected = model(kind.input())
    other = copy.deepcopy(model)
    assert type(other.layer) is type(model.layer)
    assert torch.equal(other(kind.input()), expected)
    (copied,) = da.attached(other).values()
    assert copied is not adapter
    train(copied, seed=5)
    assert not torch.equal(other(kind.input()), expected)
    assert torch.equal(model(kind.input()), expected)


@needs(QUANTISED["bnb-nf4"])
def test_a_pickled_model_computes_the_same_bits():
    kind = QUANTISED["bnb-nf4"]  # torchao's and GGUF's own layers cannot be pickled
    model, _, _ = adapt(Case("lora", {"rank": 2}), kind)
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(other(kind.input()), model(kind.input()))
