"""LoRA against PEFT's on the same factors, and its own formulas."""

import copy
import math

import pytest
import torch
from helpers.method_cases import close, train
from torch import nn

import diffadapt as da

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 6)),
    # no dilation and no padding mode, which PEFT's branch ignores; no groups, whose factors it groups as well
    "conv-3x2": (lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 0)), (2, 4, 7, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 7)),
}


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_outputs_and_gradients_equal_pefts_on_the_same_factors(make, shape, rank_stabilized):
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"layer": make().double()})
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["layer"], use_rslora=rank_stabilized, bias="none"
    )
    other = peft.inject_adapter_in_model(config, copy.deepcopy(model)).double()["layer"]
    adapter = da.attach(model, da.LoRA(rank=2, alpha=3.0, rank_stabilized=rank_stabilized), "layer")
    train(adapter)
    ours = adapter.parts[0].tensors[0]
    theirs = {"down": other.lora_A["default"].weight, "up": other.lora_B["default"].weight}
    with torch.no_grad():
        for key, weight in theirs.items():
            weight.copy_(ours[key].reshape(weight.shape))
    x = torch.randn(shape, dtype=torch.float64)
    value, expected = model["layer"](x), other(x)
    close(value, expected, 1e-10)
    value.square().sum().backward()
    expected.square().sum().backward()
    for key, weight in theirs.items():
        close(ours[key].grad, weight.grad.reshape(ours[key].shape), 1e-10)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rank": 4}, 1.0),
        ({"rank": 4, "alpha": 2.0}, 0.5),
        ({"rank": 4, "alpha": 8}, 2.0),
        ({"rank": 4, "scale": 0.4}, 0.4),
        ({"rank": 4, "rank_stabilized": True}, 2.0),
        ({"rank": 16, "alpha": 8.0, "rank_stabilized": True}, 2.0),
    ],
    ids=str,
)
def test_the_multiplier_is_alpha_over_rank_or_the_papers_scale(options, expected):
    assert da.LoRA(**options).multiplier == expected


def test_the_change_is_the_multiplier_times_up_times_down():
    model = nn.Sequential(nn.Linear(6, 5)).double()
    adapter = da.attach(model, da.LoRA(rank=2, scale=-1.5), "0")
    train(adapter)
    ours = adapter.parts[0].tensors[0]
    close(adapter.adapted_weight("0") - model[0].weight, -1.5 * ours["up"] @ ours["down"], 1e-12)


def test_the_start_is_kaimings_as_in_peft():
    adapter = da.attach(nn.Sequential(nn.Linear(400, 50)), da.LoRA(rank=64), "0")
    down = adapter.parts[0].tensors[0]["down"]
    bound = 1 / math.sqrt(400)
    assert down.abs().max() <= bound
    assert down.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not adapter.parts[0].tensors[0]["up"].any()


@pytest.mark.parametrize(
    ("layer", "count"),
    [
        (nn.Linear(6, 5), 3 * (6 + 5)),
        (nn.Conv2d(4, 6, (3, 2)), 3 * (4 * 3 * 2 + 6)),
        (nn.Conv2d(8, 8, 7, groups=8), 3 * (49 + 8)),
    ],
    ids=["linear", "conv", "depthwise"],
)
def test_it_trains_rank_times_outputs_and_inputs(layer, count):
    assert da.attach(nn.Sequential(layer), da.LoRA(rank=3), "0").num_parameters == count


def test_a_rank_above_what_the_layer_has_is_accepted():
    adapter = da.attach(nn.Sequential(nn.Linear(3, 2)), da.LoRA(rank=10), "0")
    assert adapter.num_parameters == 10 * (3 + 2)


def test_dropout_acts_on_the_branch_only():
    model = nn.Sequential(nn.Linear(64, 5))
    adapter = da.attach(model, da.LoRA(rank=2, dropout=0.5), "0")
    x = torch.randn(1, 64)
    bare = model(x)
    assert torch.equal(model(x), bare)  # the branch is zero, and nothing is dropped from the base
    train(adapter)
    assert not torch.equal(model(x), model(x))
    with torch.no_grad():
        whole = model(x) - bare
    mean = torch.stack([model(x) - bare for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, whole, rtol=0.1, atol=0.2 * whole.abs().max().item())


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_nothing_is_dropped_without_gradients(quiet):
    model = nn.Sequential(nn.Linear(64, 5))
    train(da.attach(model, da.LoRA(rank=2, dropout=0.5), "0"))
    with quiet():
        assert torch.equal(model(torch.ones(64)), model(torch.ones(64)))


def test_nothing_is_dropped_while_the_adapter_is_in_eval_mode():
    model = nn.Sequential(nn.Linear(64, 5)).eval()
    adapter = da.attach(model, da.LoRA(rank=2, dropout=0.5), "0")
    train(adapter)
    assert not torch.equal(model(torch.ones(64)), model(torch.ones(64)))
    adapter.eval()
    assert torch.equal(model(torch.ones(64)), model(torch.ones(64)))


def test_seeded_dropout_is_a_function_of_the_seed_and_the_layer():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    adapter = da.attach(model, da.LoRA(rank=2, dropout=0.5), "linear")
    train(adapter)
    x, outputs = torch.randn(1, 64), []
    for seed in (1, 2, 1):
        adapter.set_dropout_seed(seed)
        outputs.append(model(x))
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])
    masks = [adapter.parts[0].dropout(torch.ones(64), index) for index in (0, 1)]
    assert not torch.equal(*masks)
    assert set(masks[0].tolist()) == {0.0, 2.0}
