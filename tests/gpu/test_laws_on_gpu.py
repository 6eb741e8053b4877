"""The laws of `tests/methods/test_conformance.py` that a GPU could break: values, gradients and bits.

The reference is the same model in float64 on the CPU.
"""

import pytest
import torch
from helpers.layer_kinds import FEW
from helpers.method_cases import adapt, close, pairs, trainable
from safetensors.torch import load_file

import diffadapt as da

on_few = pytest.mark.parametrize(**pairs(kinds=FEW))
# relative to the largest value: a few roundings of the type
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
of_every_type = pytest.mark.parametrize("dtype", list(TOLERANCES), ids=lambda dtype: str(dtype).split(".")[1])
half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


def on_gpu(tensor):
    return tensor.to("cuda")


def loss(output):
    return output.double().square().mean()


def gradients(model, adapter, x):
    leaves = trainable(adapter)
    return torch.autograd.grad(loss(model(x)), leaves, allow_unused=True, materialize_grads=True)


@on_few
@of_every_type
def test_values_and_gradients_are_the_cpus(case, kind, dtype):
    reference, reference_adapter, _ = adapt(case, kind, torch.float64)
    model, adapter, _ = adapt(case, kind, dtype)
    model.to("cuda")
    x = kind.input(torch.float64)
    x_gpu = on_gpu(kind.input(dtype))
    output = model(x_gpu)
    assert output.device.type == "cuda"
    assert output.dtype == (dtype if kind.rows == 0 else model.layer.weight.dtype)
    close(output.cpu(), reference(x), TOLERANCES[dtype])
    expected = gradients(reference, reference_adapter, x)
    actual = gradients(model, adapter, x_gpu)
    largest = max(gradient.abs().max().item() for gradient in expected)
    for value, wanted in zip(actual, expected, strict=True):
        difference = (value.cpu().double() - wanted).abs().max().item()
        assert difference <= 4 * TOLERANCES[dtype] * largest


@on_few
@half
def test_values_and_gradients_under_autocast(case, kind, dtype):
    reference, reference_adapter, _ = adapt(case, kind, torch.float64)
    model, adapter, _ = adapt(case, kind, torch.float32)
    model.to("cuda")
    x = kind.input(torch.float64)
    with torch.autocast("cuda", dtype):
        output = model(on_gpu(kind.input()))
        actual = torch.autograd.grad(
            loss(output), trainable(adapter), allow_unused=True, materialize_grads=True
        )
    close(output.cpu(), reference(x), TOLERANCES[dtype])
    expected = gradients(reference, reference_adapter, x)
    largest = max(gradient.abs().max().item() for gradient in expected)
    for value, wanted in zip(actual, expected, strict=True):
        assert value.dtype == torch.float32
        assert (value.cpu().double() - wanted).abs().max().item() <= 4 * TOLERANCES[dtype] * largest


@on_few
@of_every_type
def test_attaching_changes_no_output_bit(case, kind, dtype):
    model, _, bare = adapt(case, kind, dtype, trained=False)
    model.to("cuda")
    bare.to("cuda")
    x = on_gpu(kind.input(dtype))
    if case.starts_exactly:
        assert torch.equal(model(x), bare(x))
    else:
        close(model(x), bare(x), TOLERANCES[dtype])


@on_few
@of_every_type
def test_merging_keeps_the_outputs_and_unmerging_restores_the_bits(case, kind, dtype):
    model, adapter, bare = adapt(case, kind, dtype)
    model.to("cuda")
    x = on_gpu(kind.input(dtype))
    live = model(x)
    da.merge(adapter)
    assert model.layer.weight.device.type == "cuda"
    close(model(x), live, 2 * TOLERANCES[dtype])
    da.unmerge(adapter)
    for name, value in bare.state_dict().items():
        assert torch.equal(model.layer.state_dict()[name].cpu(), value), name
    assert torch.equal(model(x), live)


@on_few
def test_a_file_saved_on_the_gpu_is_the_file_saved_on_the_cpu(case, kind, tmp_path):
    model, adapter, bare = adapt(case, kind)
    da.save(adapter, tmp_path / "cpu.safetensors")
    model.to("cuda")
    da.save(adapter, tmp_path / "gpu.safetensors")
    expected = load_file(tmp_path / "cpu.safetensors")
    saved = load_file(tmp_path / "gpu.safetensors")
    assert saved.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(saved[key], expected[key])] == []
    other = type(model)(bare.to("cuda"))
    loaded = da.load(other, tmp_path / "gpu.safetensors")
    assert {parameter.device.type for parameter in loaded.parameters()} <= {"cuda"}
    x = on_gpu(kind.input())
    assert torch.equal(other(x), model(x))


@on_few
def test_attaching_to_a_model_on_the_gpu_starts_like_on_the_cpu(case, kind):
    _, adapter, bare = adapt(case, kind, trained=False)
    model = type(adapt(case, kind)[0])(bare.to("cuda"))
    on_device = da.attach(model, case.method, "layer")
    for one, other in zip(adapter.parameters(), on_device.parameters(), strict=True):
        assert other.device.type == "cuda"
        close(other.cpu(), one, 1e-5)
