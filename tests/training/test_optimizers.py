"""Optimizers by name, and their state in a checkpoint: any tensor and scalar, exactly."""

import json
import sys

import pytest
import torch
from helpers.pipelines import train_options
from helpers.small_run import SmallBatches, bits, same_bits, small_train_state

import diffadapt as da
from diffadapt.methods.parse_method import make_method
from diffadapt.training.adapter_options import default_learning_rate
from diffadapt.training.checkpoint import checkpoint_io
from diffadapt.training.checkpoint.state_dict_json import pack, unpack
from diffadapt.training.loop import train
from diffadapt.training.optimizers import PACKAGED_OPTIMIZERS, make_optimizer
from diffadapt.training.param_groups import rate_groups

OPTIMIZERS = {
    "prodigy": {"learning_rate": 1.0, "optimizer_options": "safeguard_warmup=true,d0=1e-4"},
    "adamw8bit": {"optimizer_options": "min_8bit_size=16"},
    "SGD": {"optimizer_options": "momentum=0.9,nesterov=true"},
    "adafactor": {},
    "NAdam": {"optimizer_options": "betas=(0.8,0.9)"},
    "Rprop": {},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.slow
def test_4_steps_equal_2_and_a_resume_of_2_with_any_optimizer(tmp_path, name):
    if name in PACKAGED_OPTIMIZERS:
        pytest.importorskip(PACKAGED_OPTIMIZERS[name][2])
    options = {"max_train_steps": 4, "optimizer": name, **OPTIMIZERS[name]}
    whole, batches = small_train_state(**options), SmallBatches()
    losses = [step.loss for step in train(whole, batches)]
    first = small_train_state(**options)
    steps = train(first, batches)
    next(steps)
    next(steps)
    checkpoint = checkpoint_io.save_checkpoint(first, tmp_path)
    second = small_train_state(**options)
    start = bits(second)
    checkpoint_io.restore_checkpoint(second, checkpoint)
    assert [step.loss for step in train(second, batches)] == losses[2:]
    assert same_bits(bits(whole), bits(second))
    assert not same_bits(start, bits(second))


def test_the_scalars_of_prodigy_are_in_the_state(tmp_path):
    train_state = small_train_state(max_train_steps=3, optimizer="prodigy", learning_rate=1.0)
    list(train(train_state, SmallBatches()))
    stored = (checkpoint_io.save_checkpoint(train_state, tmp_path) / "state.json").read_text(encoding="utf-8")
    group = train_state.optimizer.param_groups[0]
    assert group["d_numerator"] != 0
    assert json.dumps(["k", 3]) in stored
    assert json.dumps(["d_numerator", group["d_numerator"]]) in stored


UNDECAYED = {
    "lora(rank=2)": 0,
    "loha(rank=2)": 0,
    "bitfit": 0,
    "gamma": 1,
    "difffit(beta=false,norms=false)": 1,
    "dora(rank=2)": 1 / 3,
    "pissa(rank=2)": 1,
    "liera(rank=2,inner=dora)": 1 / 3,
    "liera(rank=2,inner=pissa)": 1,
    "superlora(rank=1,groups=1,projection=nonlinear)": 1,
    "superlora(rank=1,groups=1)": 0,
    "lora(rank=2)+gamma": 1 / 3,
}


@pytest.mark.parametrize("method", UNDECAYED)
def test_weight_decay_leads_to_the_base(method):
    """Without gradients, an adapter that has not learned anything stays the base."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 5))
    x = torch.randn(4, 6)
    base = model(x)
    adapter = da.attach(model, make_method(method), "linear")
    groups = rate_groups(adapter)
    optimizer = make_optimizer(groups, train_options(learning_rate=0.1, adam_weight_decay=0.5))
    for _ in range(5):
        for parameter in adapter.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert torch.allclose(model(x), base, atol=1e-5)
    exempt = [p for group in groups if group.get("weight_decay") == 0.0 for p in group["params"]]
    trained = [p for p in adapter.parameters() if p.requires_grad]
    assert len(exempt) == round(UNDECAYED[method] * len(trained))


def parameters():
    return [torch.nn.Parameter(torch.zeros(8, 8))]


def test_names_are_found_in_any_case_and_arguments_arrive():
    optimizer = make_optimizer(
        parameters(), train_options(optimizer="rmsPROP", optimizer_options="momentum=0.5,centered=true")
    )
    group = optimizer.param_groups[0]
    assert type(optimizer) is torch.optim.RMSprop
    assert (group["momentum"], group["centered"], group["lr"]) == (0.5, True, 1e-3)
    adam = make_optimizer(
        parameters(), train_options(adam_beta2=0.95, adam_weight_decay=0.5, adam_epsilon=1e-6)
    )
    assert type(adam) is torch.optim.AdamW
    assert adam.param_groups[0]["betas"] == (0.9, 0.95)
    assert adam.param_groups[0]["weight_decay"] == 0.5
    assert adam.param_groups[0]["eps"] == 1e-6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "addamw"}, "unknown optimizer 'addamw'; did you mean .*adamw"),
        ({"optimizer": "lbfgs"}, "LBFGS needs the loss again"),
        ({"optimizer": "SGD", "adam_beta1": 0.5}, "--adam_beta1: not for --optimizer SGD"),
        ({"optimizer": "SGD", "optimizer_options": "momentun=0.5"}, "--optimizer SGD with .*momentun"),
        ({"optimizer": "SGD", "optimizer_options": "momentum=-1"}, "Invalid momentum"),
        ({"optimizer": "SGD", "optimizer_options": "momentum"}, "--optimizer_options takes name=value"),
    ],
)
def test_mistakes_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(parameters(), train_options(**given))


@pytest.mark.parametrize(("name", "package"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_a_missing_package_is_named(monkeypatch, name, package):
    for module in (package, f"{package}.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"--optimizer {name} needs a package: pip install {package}"):
        make_optimizer(parameters(), train_options(optimizer=name))


def test_prodigy_finds_its_own_rate_so_its_default_is_1():
    embedded = {"pretrained_model_name_or_path": "embedded:emoji"}
    method = make_method("lora")
    assert default_learning_rate(train_options(optimizer="Prodigy", **embedded), method) == 1
    assert default_learning_rate(train_options(**embedded), method) < 0.1


def test_what_is_packed_comes_back_with_its_kinds_and_bits():
    value = {
        0: {
            "state": torch.tensor([1, 255], dtype=torch.uint8),
            "half": torch.tensor([1e-3], dtype=torch.bfloat16),
        },
        "betas": (0.1, 0.30000000000000004),
        "big": [float("inf"), -0.0, 2**60, True, None, "text"],
        "scalar": torch.tensor(3.0),
    }
    tensors = {}
    back = unpack(json.loads(json.dumps(pack(value, "x", tensors))), tensors)
    assert list(back) == list(value)
    assert back["betas"] == value["betas"]
    assert back["big"] == value["big"]
    assert [type(item) for item in back["big"]] == [type(item) for item in value["big"]]
    assert back["scalar"].shape == ()
    for name, tensor in value[0].items():
        assert back[0][name].dtype == tensor.dtype
        assert torch.equal(back[0][name], tensor)


def test_what_would_need_pickling_is_refused():
    with pytest.raises(TypeError, match=r"x\.a is a set"):
        pack({"a": {1, 2}}, "x", {})
    with pytest.raises(ValueError, match="unknown kind of value 'object'"):
        unpack({"object": 1}, {})
