"""Blocks that run again in backward (gradient checkpointing) use what their own forward used."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import diffadapt as da

GROUPED = (
    "superlora(rank=2, groups=3)",
    "superlora(rank=2, groups=layer, tensor_order=3)",
    "superlora(rank=2, groups=1, projection=shuffle)",
    "superlora(rank=2, groups=1, projection=nonlinear, rho=0.5)",
    "superlora(rank=2, groups=1, projection=nonlinear_v2, rho=0.5)",
    "superlora(tensor_order=1, groups=1)",
)
DROPPING = ("lora", "dora", "loha", "lokr", "flora", "liera", "superlora(rank=2, groups=3)")
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


class Blocks(nn.Module):
    """Two blocks, each run through `checkpoint` where `reentrant` is not None."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 16))
        self.second = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 16))
        self.reentrant: bool | None = None

    def forward(self, x):
        if self.reentrant is None:
            return self.second(self.first(x))
        x = checkpoint(self.first, x, use_reentrant=self.reentrant)
        return checkpoint(self.second, x, use_reentrant=self.reentrant)


def adapted(spec, **options):
    torch.manual_seed(0)
    model = Blocks().double()
    adapter = da.attach(model, da.make_method(spec, **options), "linear")
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, adapter


def inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 16, dtype=torch.float64, generator=generator).requires_grad_()


def gradients(adapter, loss):
    adapter.zero_grad()
    loss.backward()
    return [None if p.grad is None else p.grad.clone() for p in adapter.parameters()]


def assert_same(actual, expected):
    for gradient, expected_gradient in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


def plain_forward(model):
    with torch.no_grad():
        model(inputs(9))


def forward_with_gradients(model):
    model(inputs(9))


def forward_without_adapter(model):
    with torch.no_grad(), da.disabled(model):
        model(inputs(9))


@REENTRANT
@pytest.mark.parametrize("between", [plain_forward, forward_with_gradients, forward_without_adapter])
@pytest.mark.parametrize("spec", GROUPED)
def test_another_forward_before_backward_changes_no_gradient(spec, between, reentrant):
    model, adapter = adapted(spec)
    expected = gradients(adapter, model(inputs(1)).square().sum())
    model.reentrant = reentrant
    y = model(inputs(1))
    between(model)
    assert_same(gradients(adapter, y.square().sum()), expected)


@REENTRANT
@pytest.mark.parametrize("spec", GROUPED)
def test_two_forwards_and_one_backward(spec, reentrant):
    model, adapter = adapted(spec)
    expected = gradients(adapter, (model(inputs(1)) - model(inputs(2))).square().sum())
    model.reentrant = reentrant
    assert_same(gradients(adapter, (model(inputs(1)) - model(inputs(2))).square().sum()), expected)


@REENTRANT
@pytest.mark.parametrize("spec", GROUPED)
def test_a_block_alone_after_a_step_uses_the_values_of_now(spec, reentrant):
    model, adapter = adapted(spec)
    model(inputs(1)).square().sum().backward()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(1.5)
    expected = gradients(adapter, model.second(inputs(1)).square().sum())
    y = checkpoint(model.second, inputs(1), use_reentrant=reentrant)
    assert_same(gradients(adapter, y.square().sum()), expected)


@REENTRANT
@pytest.mark.parametrize("spec", GROUPED)
def test_the_whole_model_can_be_the_checkpointed_block(spec, reentrant):
    model, adapter = adapted(spec)
    expected = gradients(adapter, model(inputs(1)).square().sum())
    y = checkpoint(model, inputs(1), use_reentrant=reentrant)
    model(inputs(2))
    assert_same(gradients(adapter, y.square().sum()), expected)


def test_two_adapted_models_of_one_adapter_keep_their_own_forwards():
    class Pipeline:
        def __init__(self):
            self.unet, self.text_encoder = Blocks().double(), Blocks().double()

    torch.manual_seed(0)
    pipe = Pipeline()
    method = da.make_method("superlora(rank=2, groups=1, projection=linear, rho=0.5)")
    adapter = da.attach(pipe, method, "linear", text_encoder_targets="linear")
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    expected = gradients(adapter, pipe.unet(pipe.text_encoder(inputs(1))).square().sum())
    pipe.unet.reentrant = pipe.text_encoder.reentrant = False
    assert_same(gradients(adapter, pipe.unet(pipe.text_encoder(inputs(1))).square().sum()), expected)


def test_what_a_forward_prepared_goes_with_its_graph_or_its_backward():
    model, adapter = adapted("superlora(rank=2, groups=1, projection=linear, rho=0.5)")
    part = adapter.parts[0]
    y = model(inputs(1))
    waiting = part.grouped_changes.last_forward
    model(inputs(2))
    assert waiting.changes is not None  # its backward may still come
    y.sum().backward()
    model(inputs(3))
    assert waiting.changes is None
    for seed in range(4, 8):
        model(inputs(seed))  # without a backward
    assert [reference() for reference in part.grouped_changes.earlier_forwards] == [None]


@pytest.mark.parametrize("spec", DROPPING)
def test_a_block_that_runs_again_drops_what_its_forward_dropped(spec):
    def loss(model, adapter):
        adapter.set_dropout_seed(1)
        first = model(inputs(1)).square().sum()
        adapter.set_dropout_seed(2)
        return first + model(inputs(2)).square().sum()

    model, adapter = adapted(spec, dropout=0.5)
    expected = gradients(adapter, loss(model, adapter))
    model.reentrant = False
    assert_same(gradients(adapter, loss(model, adapter)), expected)
    model.reentrant = None
    whole = lambda x: checkpoint(model, x, use_reentrant=False)  # noqa: E731
    assert_same(gradients(adapter, loss(whole, adapter)), expected)


def test_a_seed_used_before_comes_back_with_its_own_forwards():
    def loss(model, adapter):
        total = 0
        for seed in (3, 4, 3, 5):
            adapter.set_dropout_seed(seed)
            total = total + model(inputs(seed)).square().sum()
        return total

    model, adapter = adapted("lora", dropout=0.5)
    expected = gradients(adapter, loss(model, adapter))
    model.reentrant = False
    assert_same(gradients(adapter, loss(model, adapter)), expected)


@pytest.mark.parametrize("spec", DROPPING)
@pytest.mark.parametrize("seed", [None, 1])
def test_dropout_under_reentrant_checkpointing_is_refused(spec, seed):
    model, adapter = adapted(spec, dropout=0.5)
    adapter.set_dropout_seed(seed)
    model.reentrant = True
    with pytest.raises(RuntimeError, match=r"dropout=0\.5 needs checkpointing with use_reentrant=False"):
        model(inputs(1)).sum().backward()
    adapter.eval()
    model(inputs(1)).sum().backward()
