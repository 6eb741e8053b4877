"""The laws of gradients and memory, for every registered method on every kind of layer it can change."""

import copy

import pytest
import torch
from helpers.layer_kinds import FEW, IN_FLOAT32, KINDS, LARGE, MAIN
from helpers.method_cases import FIRST, Case, Model, adapt, changed, close, pairs, plain, trainable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import diffadapt as da

everything = pytest.mark.parametrize(**pairs())
on_few = pytest.mark.parametrize(**pairs(kinds=FEW))
COMPILED = ("linear", "conv-3x3", "embedding", "layer-norm")
DROPPING = [
    Case(case.spec, {**case.options, "dropout": 0.5})
    for case in FIRST
    if hasattr(case.method, "dropout") and case.spec not in ("dora",)
]
# differentiated once alone: chains of thin products
ONCE = ("lora", "dora", "vera", "pissa", "loha", "lokr", "flora", "1lora")
DETACHED = ("dora",)  # their norm counts as a constant, so finite differences see another gradient


class Checkpointed(Model):
    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False)


class Twice(Model):
    def forward(self, x):
        return self.layer(x) * self.layer(x.flip(0))


def _loss(y):
    return y.square().sum()


def _once(model, inputs):
    _loss(model(inputs[0])).backward()
    return inputs[:1]


def _accumulated(model, inputs):
    for x in inputs:
        _loss(model(x)).backward()
    return inputs


def _two_forwards_before_one_backward(model, inputs):
    outputs = [model(x) for x in inputs]
    sum(_loss(y) for y in outputs).backward()
    return inputs


def _expected_gradients(adapter, bare, inputs, together=lambda run, x: run(x)):
    """Autograd through the materialised weight: what the lean backward has to equal."""
    weight, bias = changed(adapter)
    total = sum(_loss(together(lambda v: plain(bare, v, weight, bias), x)) for x in inputs)
    leaves = [*trainable(adapter), *(x for x in inputs if x.requires_grad)]
    return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)


def _assert_gradients(adapter, inputs, expected):
    gradients = [leaf.grad for leaf in (*trainable(adapter), *(x for x in inputs if x.requires_grad))]
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        close(torch.zeros_like(expected_gradient) if gradient is None else gradient, expected_gradient, 1e-9)


def _inputs(kind, grad=True):
    inputs = [kind.input(torch.float64, seed) for seed in (2, 7)]
    return [x.requires_grad_() if grad and x.is_floating_point() else x for x in inputs]


@everything
def test_gradients_are_those_of_the_materialised_weight(case, kind):
    model, adapter, bare = adapt(case, kind, torch.float64)
    used_inputs = _once(model, _inputs(kind))
    _assert_gradients(adapter, used_inputs, _expected_gradients(adapter, bare, used_inputs))


@on_few
def test_gradients_do_not_need_one_of_the_input(case, kind):
    model, adapter, bare = adapt(case, kind, torch.float64)
    used_inputs = _once(model, _inputs(kind, grad=False))
    _assert_gradients(adapter, used_inputs, _expected_gradients(adapter, bare, used_inputs))


@on_few
def test_gradients_at_the_start_are_those_of_the_materialised_weight(case, kind):
    model, adapter, bare = adapt(case, kind, torch.float64, trained=False)
    used_inputs = _once(model, _inputs(kind))
    _assert_gradients(adapter, used_inputs, _expected_gradients(adapter, bare, used_inputs))


@on_few
@pytest.mark.parametrize("run", [_accumulated, _two_forwards_before_one_backward])
@pytest.mark.parametrize("model", [Model, Checkpointed])
@pytest.mark.slow
def test_gradients_survive_accumulation_and_checkpointing(case, kind, run, model):
    model, adapter, bare = adapt(case, kind, torch.float64, model=model)
    used_inputs = run(model, _inputs(kind))
    _assert_gradients(adapter, used_inputs, _expected_gradients(adapter, bare, used_inputs))


@on_few
def test_a_layer_used_twice_in_one_forward_gets_both_gradients(case, kind):
    model, adapter, bare = adapt(case, kind, torch.float64, model=Twice)
    used_inputs = _once(model, _inputs(kind))
    expected = _expected_gradients(adapter, bare, used_inputs, lambda run, x: run(x) * run(x.flip(0)))
    _assert_gradients(adapter, used_inputs, expected)


@on_few
def test_gradients_follow_the_strength(case, kind):
    model, adapter, bare = adapt(case, kind, torch.float64)
    adapter.strength = -0.5
    used_inputs = _once(model, _inputs(kind))
    _assert_gradients(adapter, used_inputs, _expected_gradients(adapter, bare, used_inputs))


@pytest.mark.parametrize(**pairs(kinds=[kind for kind in FEW if kind not in IN_FLOAT32]))
def test_finite_differences_confirm_the_gradients(case, kind):
    model, adapter, _ = adapt(case, kind, torch.float64)
    x = _inputs(kind)[0]
    trained = [] if any(word in str(case.method) for word in DETACHED) else trainable(adapter)
    leaves = [leaf for leaf in (x, *trained) if leaf.requires_grad]
    if leaves:
        assert torch.autograd.gradcheck(lambda *_: model(x), leaves, fast_mode=True)


@on_few
def test_every_trained_tensor_has_a_gradient_within_two_steps(case, kind):
    model, adapter, _ = adapt(case, kind, torch.float64, trained=False)
    x, reached = kind.input(torch.float64), set()
    target = torch.randn_like(model(x))
    for _ in range(2):
        adapter.zero_grad()
        (model(x) - target).square().mean().backward()
        for name, parameter in adapter.named_parameters():
            if parameter.grad is not None and parameter.grad.abs().max() > 0:
                reached.add(name)
            if parameter.grad is not None:
                parameter.data.sub_(parameter.grad, alpha=0.1)
    assert reached == {name for name, parameter in adapter.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(**pairs(FIRST, COMPILED))
@pytest.mark.slow
def test_compiling_keeps_outputs_and_gradients(case, kind):
    torch._dynamo.reset()
    model, adapter, bare = adapt(case, kind, torch.float64)
    used_inputs = _inputs(kind)[:1]
    _once(torch.compile(model, fullgraph=True, backend="aot_eager"), used_inputs)
    _assert_gradients(adapter, used_inputs, _expected_gradients(adapter, bare, used_inputs))


@pytest.mark.parametrize(**pairs(FIRST, ("linear", "conv-3x3")))
def test_second_derivatives_are_right_or_refused_never_wrong(case, kind):
    model, adapter, bare = adapt(case, kind, torch.float64)
    x, leaves = kind.input(torch.float64).requires_grad_(), trainable(adapter)

    def of_a_penalty(y):
        (slope,) = torch.autograd.grad(_loss(y), x, create_graph=True)
        return torch.autograd.grad(_loss(slope), leaves, allow_unused=True, materialize_grads=True)

    if case.spec in ONCE:
        with pytest.raises(RuntimeError, match="no second derivatives"):
            of_a_penalty(model(x))
        return
    expected = of_a_penalty(plain(bare, x, *changed(adapter)))
    for gradient, expected_gradient in zip(of_a_penalty(model(x)), expected, strict=True):
        close(gradient, expected_gradient, 1e-8)


@pytest.mark.parametrize("spec", ["lora", "dora", "dora(recompute=true)", "liera", "1lora", "superlora"])
def test_a_weight_that_would_get_no_gradient_must_be_frozen(spec):
    kind = KINDS["linear"]
    model, _, _ = adapt(Case(spec), kind)
    model.layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"weight \(10, 12\) of an adapted layer requires a gradient"):
        model(kind.input())
    with torch.no_grad():
        expected = model(kind.input())
    model.layer.weight.requires_grad_(False)
    close(model(kind.input()), expected, 1e-6)


def _saved_for_backward(model, adapter, x):
    """Bytes of every storage kept for backward that is neither the input nor anyone's tensor."""
    ignored = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *adapter.parameters())}
    ignored |= {t.untyped_storage().data_ptr() for t in adapter.buffers()}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return [t.untyped_storage().nbytes() for pointer, t in saved.items() if pointer not in ignored]


@pytest.mark.parametrize(**pairs(kinds=LARGE, of=LARGE))
def test_no_weight_sized_tensor_is_kept_for_backward(case, kind):
    model, adapter, _ = adapt(case, kind)
    saved = _saved_for_backward(model, adapter, kind.input().requires_grad_())
    size = model.layer.weight.untyped_storage().nbytes()
    if _keeps_its_group(case):
        assert sum(saved) < 1.5 * size
    else:
        assert max(saved, default=0) < size / 2


def _keeps_its_group(case):
    """The stated exception: SuperLoRA keeps the vector of a group that is projected or not a matrix."""
    projected, order = case.options.get("projection", "none"), case.options.get("tensor_order", 2)
    return case.spec == "superlora" and (projected != "none" or order != 2)


@pytest.mark.parametrize(**pairs(DROPPING, LARGE, of=LARGE))
def test_no_weight_sized_tensor_is_kept_for_backward_under_dropout(case, kind):
    model, adapter, _ = adapt(case, kind)
    saved = _saved_for_backward(model, adapter, kind.input().requires_grad_())
    assert max(saved, default=0) < model.layer.weight.untyped_storage().nbytes() / 2


@pytest.mark.parametrize(**pairs(DROPPING, MAIN))
def test_finite_differences_confirm_the_gradients_under_dropout(case, kind):
    model, adapter, _ = adapt(case, kind, torch.float64)
    adapter.set_dropout_seed(5)
    leaves = [_inputs(kind)[0], *trainable(adapter)]
    assert torch.autograd.gradcheck(lambda x, *_: model(x), leaves, fast_mode=True)


@pytest.mark.parametrize(**pairs(kinds=("linear", "conv-3x3")))
def test_half_precision_gradients_are_those_of_float32_to_its_accuracy(case, kind):
    model, adapter, bare = adapt(case, kind, torch.bfloat16)
    model(kind.input(torch.bfloat16)).float().square().sum().backward()
    exact, exact_adapter, _ = adapt(case, kind, torch.float32)
    with torch.no_grad():
        exact.layer.load_state_dict(copy.deepcopy(bare).float().state_dict())
        for parameter, other in zip(exact_adapter.parameters(), adapter.parameters(), strict=True):
            parameter.copy_(other)
    exact(kind.input(torch.bfloat16).float()).square().sum().backward()
    for parameter, other in zip(trainable(adapter), trainable(exact_adapter), strict=True):
        close(parameter.grad, other.grad, 0.05)


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(**pairs(FIRST, ("linear",)))
@pytest.mark.slow
def test_compiling_for_sampling_needs_no_graph_break(case, kind, quiet):
    torch._dynamo.reset()
    model, _, _ = adapt(case, kind)
    with quiet():
        x = kind.input()
        close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x), 1e-6)


@pytest.mark.parametrize(
    "spec", ["gamma", "difffit(norms=False, class_embedding=False)", "dora", "dora(recompute=true)"]
)
def test_small_scales_are_not_rounded_in_half_precision(spec):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 64)).bfloat16()
    x = torch.randn(512, 256).bfloat16()
    bare = model(x).double()
    adapter = da.attach(model, da.make_method(spec), "0")
    close(model(x), bare, 0.0)
    for name, parameter in adapter.named_parameters():
        if name.endswith(("gamma", "magnitude")):
            parameter.data.mul_(1.003)
    slope = (model(x).double() * bare).sum() / bare.square().sum()
    assert abs(slope.item() - 1.003) < 5e-4
