"""Methods that PEFT has: same factors, same outputs, gradients and merges."""

import copy

import pytest
import torch
from helpers.method_cases import Model, close
from helpers.originals import assert_same, flat, layer, randomized, same
from peft import (
    HiraConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)

import diffadapt as da

CONVS = ("conv", "conv-1x1")


def injected(config, base):
    """PEFT's layer around a copy of ``base``, its factors random."""
    model = inject_adapter_in_model(config, Model(copy.deepcopy(base)))
    theirs = model.layer
    randomized([p for p in theirs.parameters() if p.requires_grad])
    return theirs


def lora_tensors(theirs):
    return {
        "up": (theirs.lora_B["default"].weight, flat),
        "down": (theirs.lora_A["default"].weight, flat),
    }


@pytest.mark.parametrize("kind", ["linear", *CONVS])
@pytest.mark.parametrize("stabilized", [False, True])
def test_lora(kind, stabilized):
    base, x = layer(kind)
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=stabilized, target_modules=["layer"])
    theirs = injected(config, base)
    method = da.LoRA(rank=4, alpha=6, rank_stabilized=stabilized)
    assert_same(base, method, x, theirs, lora_tensors(theirs))


@pytest.mark.parametrize("kind", ["linear", *CONVS])
def test_dora(kind):
    base, x = layer(kind)
    theirs = injected(LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["layer"]), base)
    magnitude = theirs.lora_magnitude_vector["default"].weight
    magnitude.data.abs_().add_(0.5)
    tensors = lora_tensors(theirs) | {"magnitude": (magnitude, torch.flatten)}
    assert_same(base, da.DoRA(rank=4, alpha=6), x, theirs, tensors)


def test_the_magnitudes_of_dora_start_as_in_peft():
    for kind in ("linear", *CONVS):
        base, _ = layer(kind)
        theirs = inject_adapter_in_model(
            LoraConfig(r=2, use_dora=True, target_modules=["layer"]), Model(base)
        )
        model = Model(layer(kind)[0])
        ours = da.attach(model, da.DoRA(rank=2), "layer").parts[0].tensors[0]["magnitude"]
        close(ours, theirs.layer.lora_magnitude_vector["default"].weight.flatten(), 1e-12)


def test_vera():
    base, x = layer("linear")
    config = VeraConfig(r=5, target_modules=["layer"])
    theirs = get_peft_model(Model(copy.deepcopy(base)), config).double().base_model.model.layer
    randomized([p for p in theirs.parameters() if p.requires_grad])
    tensors = {
        "out_scale": (theirs.vera_lambda_b["default"], same),
        "rank_scale": (theirs.vera_lambda_d["default"], same),
    }
    frozen = {"up_10x12": theirs.vera_B["default"], "down_10x12": theirs.vera_A["default"]}
    assert_same(base, da.VeRA(rank=5), x, theirs, tensors, frozen=frozen)


@pytest.mark.parametrize("kind", ["linear", *CONVS, "conv-grouped"])
@pytest.mark.parametrize("rank", [1, 4])
def test_loha(kind, rank):
    base, x = layer(kind)
    theirs = injected(LoHaConfig(r=rank, alpha=3, target_modules=["layer"]), base)
    tensors = {
        "up_1": (theirs.hada_w1_a["default"], same),
        "down_1": (theirs.hada_w1_b["default"], same),
        "up_2": (theirs.hada_w2_a["default"], same),
        "down_2": (theirs.hada_w2_b["default"], same),
    }
    assert_same(base, da.LoHa(rank=rank, alpha=3), x, theirs, tensors)


@pytest.mark.parametrize("kind", ["linear", *CONVS, "conv-grouped"])
@pytest.mark.parametrize("factor", [-1, 2])
def test_lokr(kind, factor):
    base, x = layer(kind)
    theirs = injected(LoKrConfig(r=1, alpha=3, decompose_factor=factor, target_modules=["layer"]), base)
    tensors = {
        "left": (theirs.lokr_w1["default"], same),
        "up": (theirs.lokr_w2_a["default"], same),
        "down": (theirs.lokr_w2_b["default"], same),
    }
    assert_same(base, da.LoKr(rank=1, alpha=3, factor=factor), x, theirs, tensors)


def test_lokr_with_a_dense_right_side():
    base, x = layer("linear")
    theirs = injected(LoKrConfig(r=8, alpha=8, target_modules=["layer"]), base)
    tensors = {"left": (theirs.lokr_w1["default"], same), "right": (theirs.lokr_w2["default"], same)}
    assert_same(base, da.LoKr(rank=8), x, theirs, tensors)


@pytest.mark.parametrize("kind", ["linear", *CONVS])
def test_first_order_liera_is_hira_at_multiplier_one(kind):
    base, x = layer(kind)
    theirs = injected(HiraConfig(r=4, target_modules=["layer"]), base)
    tensors = {
        "up": (theirs.hira_B["default"], flat),
        "down": (theirs.hira_A["default"], flat),
    }
    assert_same(base, da.LieRA(rank=4, scale=1.0), x, theirs, tensors)


def test_pissa_which_peft_writes_into_the_weight():
    base, x = layer("linear")
    config = LoraConfig(r=3, lora_alpha=3, init_lora_weights="pissa", target_modules=["layer"])
    theirs = inject_adapter_in_model(config, Model(copy.deepcopy(base).float())).double().layer
    up, down = theirs.lora_B["default"].weight, theirs.lora_A["default"].weight
    start = {"start_up": up.detach().clone(), "start_down": down.detach().clone()}
    base.weight.data.copy_(theirs.base_layer.weight + up @ down)  # the weight before PEFT took the start away
    ours = da.attach(Model(copy.deepcopy(base)), da.PiSSA(rank=3), "layer").parts[0].tensors[0]
    close(ours["start_up"] @ ours["start_down"], up @ down, 1e-5)
    randomized([up, down])
    assert_same(base, da.PiSSA(rank=3), x, theirs, lora_tensors(theirs), frozen=start)
