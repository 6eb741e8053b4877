"""Every method on a whole model: shared weights, checkpointed blocks, components that meet in one loss."""

import copy

import pytest
import torch
from helpers.method_cases import CASES, close, train, trainable
from helpers.models import denoiser, image, pipeline
from torch import nn
from torch.utils.checkpoint import checkpoint

import diffadapt as da

KINDS = [set().union(*(part.kinds for part in case.method.members)) for case in CASES]
LINEAR = [case for case, kinds in zip(CASES, KINDS, strict=True) if "linear" in kinds]
everywhere = pytest.mark.parametrize("case", CASES, ids=str)
on_linear = pytest.mark.parametrize("case", LINEAR, ids=str)


def targets(case):
    return "+".join(sorted(set().union(*(part.kinds for part in case.method.members))))


def gradients(adapter, loss):
    adapter.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trainable(adapter)]


@everywhere
@pytest.mark.slow
def test_checkpointed_blocks_give_the_same_gradients(case):
    model = denoiser().double()
    adapter = da.attach(model, case.method, targets(case))
    train(adapter)
    x = image().double()
    expected = gradients(adapter, model(x).square().sum())
    for block in model.blocks:
        inner = block.forward
        block.forward = lambda rows, inner=inner: checkpoint(inner, rows, use_reentrant=False)
    for own, wanted in zip(gradients(adapter, model(x).square().sum()), expected, strict=True):
        close(own, wanted, 1e-10)


@everywhere
def test_merging_a_whole_model_keeps_its_outputs_and_unmerging_its_bits(case):
    model = denoiser().double()
    bare = copy.deepcopy(model).state_dict()
    adapter = da.attach(model, case.method, targets(case))
    train(adapter, 0.1)
    x = image().double()
    expected = model(x)
    da.merge(adapter)
    close(model(x), expected, 1e-9)
    da.detach(adapter)
    assert model.state_dict().keys() == bare.keys()
    assert all(torch.equal(value, bare[key]) for key, value in model.state_dict().items())


@on_linear
def test_layers_that_share_a_weight_are_changed_alike(case):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)).double()
    model[2].weight = model[0].weight
    bare = copy.deepcopy(model).state_dict()
    adapter = da.attach(model, case.method, "linear+norm")
    train(adapter)
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = model(x)
    da.merge(adapter)
    assert model[2].weight is model[0].weight
    close(model(x), expected, 1e-10)
    da.unmerge(adapter)
    assert all(torch.equal(value, bare[key]) for key, value in model.state_dict().items())


@on_linear
@pytest.mark.slow
def test_components_that_meet_in_one_loss_add_their_gradients(case):
    pipe = pipeline()
    for component in (pipe.unet, pipe.text_encoder):
        component.double()
    adapter = da.attach(pipe, case.method, "attention+norm", text_encoder_targets="linear")
    train(adapter)
    text, picture = torch.randn(3, 6).double(), image().double()
    apart = [
        first + second
        for first, second in zip(
            gradients(adapter, pipe.text_encoder(text).square().sum()),
            gradients(adapter, pipe.unet(picture).square().sum()),
            strict=True,
        )
    ]
    hidden, noise = pipe.text_encoder(text), pipe.unet(picture)
    together = gradients(adapter, hidden.square().sum() + noise.square().sum())
    for own, wanted in zip(together, apart, strict=True):
        close(own, wanted, 1e-10)


@on_linear
def test_a_layer_called_outside_its_models_forward_is_adapted_too(case):
    model = denoiser().double()
    adapter = da.attach(model, case.method, "linear+norm")
    train(adapter)
    layer, x = model.blocks[0].to_out[0], torch.randn(3, 8).double()
    weight, bias = adapter.adapted_weight("blocks.0.to_out.0"), adapter.adapted_bias("blocks.0.to_out.0")
    close(layer(x), x @ weight.T + bias, 1e-10)
