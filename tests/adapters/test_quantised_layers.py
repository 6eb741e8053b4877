"""Quantised layers: which are known, what they are refused for, and what merging, files and exports say."""

import warnings

import pytest
import torch
from helpers.method_cases import Model, close, train
from helpers.pipelines import tiny_unet
from helpers.quantised_kinds import IN, OUT, QUANTISED, bitsandbytes_4bit, needs, torchao
from torch import nn

import diffadapt as da
from diffadapt.adapters.quantised_layers import QuantisedWeight, count_base_parameters, quantised_layer
from diffadapt.adapters.targets import site_of_layer

every_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=needs(kind), id=name) for name, kind in QUANTISED.items()]
)
NF4, INT8, FLOAT8 = QUANTISED["bnb-nf4"], QUANTISED["torchao-int8"], QUANTISED["torchao-float8"]


@every_kind
def test_a_quantised_layer_is_known_by_kind_shape_and_values(kind):
    layer = kind.layer()
    quantised = quantised_layer(layer)
    assert quantised.kind.name == kind.stored_as
    assert quantised.shape == (OUT, IN)
    site = site_of_layer("layer", layer)
    assert (site.kind, site.shape, site.has_bias) == ("linear", (OUT, IN), layer.bias is not None)
    units = torch.eye(IN)
    expected = (layer(units) - layer(torch.zeros_like(units))).T
    close(quantised.dequantise(), expected, 1e-4 if kind.rounds_input else 1e-6)


def test_plain_layers_are_not_quantised():
    assert quantised_layer(nn.Linear(2, 2)) is None
    assert quantised_layer(nn.Conv2d(2, 2, 1)) is None


@needs(NF4)
def test_nested_statistics_of_four_bits_are_dequantised():
    layer = bitsandbytes_4bit(nn.Linear(IN, OUT), "nf4", nested=True)
    quantised = quantised_layer(layer)
    units = torch.eye(IN)
    close(quantised.dequantise(), (layer(units) - layer.bias).T, 1e-6)


@needs(NF4)
def test_the_layout_that_bitsandbytes_samples_with_on_bf16_cpus_is_dequantised():
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    layer = bitsandbytes_4bit(nn.Linear(IN, OUT), "nf4")
    expected = quantised_layer(layer).dequantise()
    packed, state = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = packed, state
    close(quantised_layer(layer).dequantise(), expected, 2**-8)  # it keeps scales in bfloat16


@needs(INT8)
def test_a_weight_that_is_read_becomes_numbers_and_holds_none_itself():
    quantised = quantised_layer(INT8.layer())
    weight, dense = quantised.weight(), quantised.dequantise()
    assert isinstance(weight, QuantisedWeight)
    assert isinstance(weight.detach(), QuantisedWeight)
    assert weight.untyped_storage().nbytes() == 0
    assert (weight.shape, weight.dtype, weight.device) == (dense.shape, torch.float32, dense.device)
    assert "torchao int8" in repr(weight)
    for read in (torch.clone, torch.Tensor.double, lambda w: w + 1, lambda w: w.reshape(-1)):
        value = read(weight)
        assert type(value) is torch.Tensor
        assert torch.equal(value, read(dense))
    assert torch.equal(torch.linalg.svd(weight).S, torch.linalg.svd(dense).S)
    matrix = torch.randn(IN, 3)
    close(weight @ matrix, dense @ matrix, 1e-6)
    close(weight.norm(dim=1), dense.norm(dim=1), 1e-6)
    close(weight.norm(dim=0), dense.norm(dim=0), 1e-6)


@every_kind
def test_parameters_are_counted_by_the_values_that_they_mean(kind):
    model = Model(kind.layer())
    count = IN * OUT + OUT * kind.has_bias
    assert count_base_parameters(model) == count
    da.attach(model, da.LoRA(rank=2), "layer")
    assert count_base_parameters(model) == count


class QLinear(nn.Linear):
    """A stand-in for the layer of a quantiser that is not known, such as quanto's."""


def test_layers_of_unknown_quantisers_are_refused_at_attach():
    model = nn.Sequential(QLinear(4, 4))
    with pytest.raises(TypeError, match=r"0 is a .*QLinear, which cannot be adapted; .*'!0'.*bitsandbytes"):
        da.attach(model, da.LoRA(), "linear")
    assert type(model[0]) is QLinear


@needs(NF4)
def test_four_bit_layers_that_are_not_quantised_yet_are_refused():
    import bitsandbytes

    model = nn.Sequential(bitsandbytes.nn.Linear4bit(IN, OUT))
    with pytest.raises(TypeError, match=r"0 is a bitsandbytes.*Linear4bit, which cannot be adapted"):
        da.attach(model, da.LoRA(), "linear")
    model = nn.Sequential(bitsandbytes.nn.Linear8bitLt(IN, OUT))
    with pytest.raises(TypeError, match=r"0 is a bitsandbytes.*Linear8bitLt, which cannot be adapted"):
        da.attach(model, da.LoRA(), "linear")


@every_kind
@pytest.mark.parametrize("spec", ["full", "full+lora"])
def test_whole_weights_are_not_trained_on_a_quantised_base(kind, spec):
    model = Model(kind.layer())
    with pytest.raises(ValueError, match=r"full trains the whole weight of layer, which is quantised \("):
        da.attach(model, da.make_method(spec), "layer")
    assert not hasattr(model.layer, "_diffadapt")


@needs(NF4)
def test_methods_of_peft_are_refused_on_a_quantised_layer():
    model = Model(NF4.layer())
    with pytest.raises(ValueError, match=r"cannot change layer, which is quantised \(bitsandbytes nf4\)"):
        da.attach(model, da.make_method("peft:LORA(r=2)"), "layer")
    assert "Adapted" not in type(model.layer).__name__


@every_kind
def test_merging_is_refused_with_the_remedy_and_changes_nothing(kind):
    model = Model(kind.layer())
    adapter = da.attach(model, da.LoRA(rank=2), "layer")
    train(adapter)
    expected = model(kind.input())
    with pytest.raises(ValueError, match=r"layer is quantised .*load the base in bfloat16 or float32"):
        da.merge(adapter)
    assert not adapter.merged
    assert torch.equal(model(kind.input()), expected)


@pytest.mark.parametrize("name", ["torchao-int8", "torchao-float8"])
def test_training_on_torchao_ends_in_a_file(name, tmp_path):
    kind = QUANTISED[name]
    if needs(kind).args[0]:
        pytest.skip("needs torchao")
    model = Model(kind.layer())
    adapter = da.attach(model, da.LoRA(rank=2), "layer")
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(2):
        model(kind.input().requires_grad_()).square().sum().backward()
        optimizer.step()
    expected = model(kind.input())
    da.save(adapter, tmp_path / "a.safetensors")
    again = Model(kind.layer())
    da.load(again, tmp_path / "a.safetensors", strict_base=True)
    assert torch.equal(again(kind.input()), expected)


@needs(FLOAT8)
def test_a_torchao_weight_that_rounds_its_input_is_not_used_for_norms():
    layer = torchao(nn.Linear(IN, OUT), "Int8DynamicActivationInt8WeightConfig")
    quantised = quantised_layer(layer)
    assert quantised.kind.rounds_input
    matrix = torch.randn(IN, 2)
    assert torch.equal(quantised.weight() @ matrix, quantised.dequantise() @ matrix)


def _files(tmp_path):
    """A LoRA and a DoRA trained on a UNet whose attention is in four bits, and the plain UNet."""
    unet = tiny_unet()
    names = [name for name, layer in unet.named_modules() if name.endswith("to_q")]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(unet.get_submodule(parent), leaf, bitsandbytes_4bit(unet.get_submodule(name), "nf4"))
    return unet, "to_q"


@needs(NF4)
def test_an_adapter_of_a_quantised_base_explains_itself_on_the_plain_one(tmp_path):
    unet, targets = _files(tmp_path)
    adapter = da.attach(unet, da.LoRA(rank=2), targets)
    train(adapter)
    path = tmp_path / "a.safetensors"
    da.save(adapter, path, base="some/model")
    assert da.read_metadata(path)["adapter"]["base"]["quantisation"] == "bitsandbytes nf4"
    message = r"are quantised \(bitsandbytes nf4\) \(base: some/model\), and here they are not quantised"
    with pytest.warns(UserWarning, match=message) as caught:
        da.load(tiny_unet(), path)
    assert not any("trained on other weights" in str(warning.message) for warning in caught)
    with pytest.raises(ValueError, match=message + r".*strict_base=False"):
        da.load(tiny_unet(), path, strict_base=True)


@needs(NF4)
def test_an_adapter_of_a_plain_base_explains_itself_on_the_quantised_one(tmp_path):
    unet, targets = _files(tmp_path)
    da.save(da.attach(tiny_unet(), da.LoRA(rank=2), targets), tmp_path / "a.safetensors")
    message = r"are not quantised \(base: not recorded\), and here they are quantised \(bitsandbytes nf4\)"
    with pytest.warns(UserWarning, match=message):
        da.load(unet, tmp_path / "a.safetensors")


@needs(NF4)
@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_exports_say_whether_they_belong_to_the_quantised_values(to, tmp_path):
    unet, targets = _files(tmp_path)
    adapter = da.attach(unet, da.LoRA(rank=2), targets)
    train(adapter)
    report = da.export(adapter, tmp_path / "lora.safetensors", to)
    assert report.note == ""
    header = da.read_metadata(tmp_path / "lora.safetensors")
    assert header["diffadapt.base_quantisation"] == "bitsandbytes nf4"
    assert "diffadapt.quantised_base" not in header
    da.detach(adapter)
    adapter = da.attach(unet, da.make_method("dora(rank=2)"), targets)
    train(adapter)
    report = da.export(adapter, tmp_path / "dora.safetensors", to)
    assert "computed from the base's quantised weights (bitsandbytes nf4)" in report.note
    assert report.note in str(report)
    assert da.read_metadata(tmp_path / "dora.safetensors")["diffadapt.quantised_base"] == report.note


@needs(NF4)
def test_a_lora_trained_on_a_quantised_base_is_exported_as_it_is(tmp_path):
    unet, targets = _files(tmp_path)
    adapter = da.attach(unet, da.LoRA(rank=2), targets)
    train(adapter)
    da.export(adapter, tmp_path / "lora.safetensors", "diffusers")
    plain = tiny_unet()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = da.load(plain, tmp_path / "lora.safetensors")
    for site in adapter.sites:
        change = adapter.adapted_weight(site) - quantised_layer_of(unet, site.name).dequantise()
        start = plain.get_submodule(site.name).weight
        close(loaded.adapted_weight(site.name) - start, change, 1e-5)


def quantised_layer_of(model, name):
    return model.get_submodule(name)._diffadapt.quantised


@needs(NF4)
def test_a_merged_export_is_refused_with_the_command_that_does_it(tmp_path):
    unet, targets = _files(tmp_path)
    adapter = da.attach(unet, da.LoRA(rank=2), targets)
    with pytest.raises(ValueError, match=r"is quantised .*`diffadapt export FILE FOLDER --to merged` loads"):
        da.export(adapter, tmp_path / "merged", "merged")
    assert not (tmp_path / "merged").exists()
