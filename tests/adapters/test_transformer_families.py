"""Adapters on every transformer family: under gradient checkpointing, merged, saved, loaded and detached."""

import copy
import functools

import pytest
import torch
from helpers.family_pipelines import denoiser_arguments, denoiser_output, tiny_pipeline
from helpers.method_cases import close, train, trainable

import diffadapt as da
from diffadapt.models.chroma import pass_mask_to_checkpoints

pytestmark = pytest.mark.slow

FAMILIES = ("sd35_medium", "flux", "flux2_klein", "qwen_image", "z_image", "krea2", "chroma", "pixart_sigma")
METHODS = ("lora(rank=2)", "flora(rank=2)", "superlora(rank=1)", "difffit")
cases = pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param(family, method, marks=() if method == METHODS[0] else pytest.mark.slow)
        for family in FAMILIES
        for method in METHODS
    ],
)


@functools.cache
def pipeline_and_call(family):
    pipe = tiny_pipeline(family)
    pipe.transformer.requires_grad_(False)  # torch chooses other kernels for trained weights
    return pipe, denoiser_arguments(family, pipe)


def adapted(family, method):
    """A pipeline whose denoiser is a copy, a call of it, and a trained adapter on attention and networks."""
    cached_pipe, call = pipeline_and_call(family)
    pipe = copy.copy(cached_pipe)
    pipe.transformer = copy.deepcopy(cached_pipe.transformer)
    adapter = da.attach(pipe, da.make_method(method), "attention+mlp")
    train(adapter, size=0.1)
    return pipe, call, adapter


def output_and_gradients(pipe, call, adapter):
    adapter.zero_grad()
    output = denoiser_output(pipe, call)
    output.square().sum().backward()
    return output.detach(), [parameter.grad.clone() for parameter in trainable(adapter)]


@cases
def test_gradient_checkpointing_changes_no_bit(family, method):
    pipe, call, adapter = adapted(family, method)
    output, gradients = output_and_gradients(pipe, call, adapter)
    pipe.transformer.enable_gradient_checkpointing()
    if family == "chroma":  # diffusers alone loses the mask of single blocks
        pass_mask_to_checkpoints(pipe.transformer, call[1]["attention_mask"])
    again, gradients_again = output_and_gradients(pipe, call, adapter)
    assert torch.equal(again, output)
    for gradient, other in zip(gradients, gradients_again, strict=True):
        assert torch.equal(gradient, other)


@cases
@torch.no_grad()
def test_merging_saving_and_detaching(family, method, tmp_path):
    bare, call = pipeline_and_call(family)
    bare_output = denoiser_output(bare, call)
    pipe, call, adapter = adapted(family, method)
    output = denoiser_output(pipe, call)
    assert (output - bare_output).abs().max() > 1e-3 * bare_output.abs().max()

    da.save(adapter, tmp_path / "adapter.safetensors")
    da.merge(adapter)
    close(denoiser_output(pipe, call), output, 1e-6)
    da.unmerge(adapter)
    assert torch.equal(denoiser_output(pipe, call), output)
    da.detach(adapter)
    assert torch.equal(denoiser_output(pipe, call), bare_output)
    da.load(pipe, tmp_path / "adapter.safetensors")
    assert torch.equal(denoiser_output(pipe, call), output)


@pytest.mark.parametrize("family", FAMILIES)
def test_attaching_changes_no_bit(family):
    bare, call = pipeline_and_call(family)
    pipe, _, adapter = adapted(family, "lora(rank=2)")
    da.detach(adapter)
    da.attach(pipe, da.make_method("lora(rank=2)+difffit"), "attention+mlp")
    with torch.no_grad():
        assert torch.equal(denoiser_output(pipe, call), denoiser_output(bare, call))
