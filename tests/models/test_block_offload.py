"""Blocks in main memory come to the device for forward and backward. There is no GPU: away means NaN here."""

import pytest
import torch
from helpers.family_pipelines import tiny_pipeline
from helpers.pipelines import tiny_unet

import diffadapt as da
from diffadapt.models.block_offload import BlockOffload, outermost_blocks

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


class Watched(BlockOffload):
    """Blocks that are away hold NaN, as if they were out of reach.

    Attributes:
        most: the largest number of blocks that were on the device at a time.
        loads: how often a block came.
    """

    def __init__(self, denoiser, resident):
        super().__init__(denoiser, CPU, resident)
        self.most = 0
        self.loads = 0
        for block in self._host:
            self._unload(block)

    def load(self, block):
        self.loads += block not in self._loaded
        super().load(block)
        present = [one for one in self._host if not next(one.parameters()).isnan().any()]
        self.most = max(self.most, len(present))

    def _unload(self, block):
        for weight, value in self._host[block]:
            weight.data = torch.full_like(value, torch.nan)


def flux_inputs():
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 16, 64),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([1.0]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }


def unet_inputs():
    torch.manual_seed(1)
    return {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 6, 32),
    }


def attached(make_model, method):
    torch.manual_seed(0)
    model = make_model()
    adapter = da.attach(model, da.make_method(method), targets="attention", seed=0)
    torch.manual_seed(3)
    for parameter in adapter.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model, adapter


def step(model, adapter, inputs):
    """The output of a forward pass and the gradients of its backward pass."""
    output = model(**inputs, return_dict=False)[0]
    output.square().mean().backward()
    gradients = [parameter.grad for parameter in adapter.parameters() if parameter.requires_grad]
    return [output.detach(), *gradients]


MODELS = {
    "flux": (lambda: tiny_pipeline("flux").transformer, flux_inputs),
    "unet": (tiny_unet, unet_inputs),
}


@pytest.mark.parametrize("method", ["lora(rank=2)", "dora(rank=2)", "liera(rank=2)"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_without(name, checkpointing, method):
    make_model, make_inputs = MODELS[name]
    expected = step(*attached(make_model, method), make_inputs())
    for resident in (1, 2):
        model, adapter = attached(make_model, method)
        offload = Watched(model, resident)
        if checkpointing:
            model.enable_gradient_checkpointing()
        found = step(model, adapter, make_inputs())
        assert len(found) == len(expected)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert offload.most == resident


def test_the_blocks_that_the_forward_pass_left_are_not_loaded_again():
    model, adapter = attached(*[MODELS["flux"][0], "lora(rank=2)"])
    count = len(outermost_blocks(model))
    assert count == 4
    offload = Watched(model, 3)
    step(model, adapter, flux_inputs())
    assert offload.loads == count + 1
    step(model, adapter, flux_inputs())
    assert offload.loads == count + 1 + 2


def test_it_ends_with_everything_in_main_memory():
    model, _ = attached(MODELS["flux"][0], "lora(rank=2)")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    offload = BlockOffload(model, CPU, 1)
    model(**flux_inputs())
    offload.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in outermost_blocks(model))


def test_more_blocks_than_there_are_is_an_error():
    with pytest.raises(ValueError, match=r"--offload_blocks 4 .* has \(4\)"):
        BlockOffload(MODELS["flux"][0](), CPU, 4)
    with pytest.raises(ValueError, match=r"as many blocks on the device as this Linear has \(0\)"):
        BlockOffload(torch.nn.Linear(1, 1), CPU, 1)


def test_quantised_weights_are_refused():
    class QuantisedWeight(torch.nn.Parameter):
        """A class of its own, as every package of quantised weights has."""

    model = MODELS["flux"][0]()
    layer = model.single_transformer_blocks[1].proj_out
    layer.weight = QuantisedWeight(layer.weight.data, requires_grad=False)
    with pytest.raises(ValueError, match="not those of type QuantisedWeight"):
        BlockOffload(model, CPU, 1)
