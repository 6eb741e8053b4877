"""FLoRA against an einsum in float64, LyCORIS's Tucker convolution, and the paper's counts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.method_cases import close, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import diffadapt as da

CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "5x3-stride": {"kernel_size": (5, 3), "stride": (2, 1), "padding": (2, 1)},
    "dilation": {"kernel_size": 3, "dilation": 2},
    "groups-2": {"kernel_size": 3, "groups": 2, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": 8, "padding": 1},
}


def factors(adapter):
    return adapter.parts[0].tensors[0]


def first_gradient(method, factor, channels=32):
    """Mean size of the first gradient of one factor of a 3x3 convolution, of one fixed loss."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1))
    x, target = torch.randn(2, 2, channels, 8, 8).unbind()
    adapter = da.attach(model, method, "0")
    F.mse_loss(model(x), target).backward()
    return factors(adapter)[factor].grad.abs().mean().item()


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_is_the_papers_four_products(options):
    layer = nn.Conv2d(8, 16, **options).double()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    model = nn.Sequential(layer)
    adapter = da.attach(model, da.FLoRA(rank_in=2, rank_out=3, kernel_rank=2, scale=1.7), "0")
    train(adapter)
    tensors = factors(adapter)
    x = torch.randn(2, 8, 9, 8, dtype=torch.float64)

    delta = torch.einsum(
        "abcd,oa,ib,hc,wd->oihw",
        tensors["core"],
        tensors["up"],
        tensors["down"].T,
        tensors["kernel_0"],
        tensors["kernel_1"],
    )
    geometry = {key: value for key, value in options.items() if key != "kernel_size"}
    expected = F.conv2d(x, weight + 1.7 * delta, bias, **geometry)
    value = model(x)
    close(value, expected, 1e-10)
    close(adapter.adapted_weight("0"), weight + 1.7 * delta, 1e-12)
    gradients = torch.autograd.grad(value.square().sum(), list(tensors.values()))
    expected_gradients = torch.autograd.grad(expected.square().sum(), list(tensors.values()))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        close(gradient, expected_gradient, 1e-10)


@pytest.mark.parametrize(("inputs", "outputs"), [(6, 10), (10, 6)])
def test_a_linear_layer_is_the_product_of_three(inputs, outputs):
    model = nn.Sequential(nn.Linear(inputs, outputs)).double()
    adapter = da.attach(model, da.FLoRA(rank_in=2, rank_out=3, alpha=2.0, rank=4), "0")
    train(adapter)
    tensors, x = factors(adapter), torch.randn(5, inputs, dtype=torch.float64)
    delta = 0.5 * tensors["up"] @ tensors["core"] @ tensors["down"]
    close(model(x), F.linear(x, model[0].weight + delta, model[0].bias), 1e-12)


def count(layer, r_in, r_out, r3):
    """The paper's formula for one layer."""
    if isinstance(layer, nn.Linear):
        return r_in * r_out + r_in * layer.in_features + r_out * layer.out_features
    kernel = layer.kernel_size[0]
    r3 = min(r3, kernel)
    inputs = layer.in_channels // layer.groups
    return r_in * r_out * r3**2 + r_in * inputs + r_out * layer.out_channels + 2 * kernel * r3


LAYERS = {
    "linear": nn.Linear(12, 20),
    "3x3": nn.Conv2d(12, 20, 3),
    "1x1": nn.Conv2d(12, 20, 1),
    "7x7-depthwise": nn.Conv2d(12, 12, 7, groups=12),
    "groups": nn.Conv2d(12, 18, 3, groups=3),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(("r_in", "r_out", "r3"), [(4, 4, 2), (3, 5, 1), (2, 7, 3), (16, 16, 9)])
def test_the_count_of_a_layer_follows_the_papers_formula(layer, r_in, r_out, r3):
    adapter = da.attach(nn.Sequential(layer), da.FLoRA(rank_in=r_in, rank_out=r_out, kernel_rank=r3), "0")
    expected = count(layer, r_in, r_out, r3)
    da.detach(adapter)
    assert adapter.num_parameters == expected


def test_a_320_channel_convolution_at_rank_16_trains_11276():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(320, 320, 3))
    assert da.attach(model, da.FLoRA(rank=16, kernel_rank=2), "0").num_parameters == 11_276


def test_only_the_core_starts_at_zero_and_the_factors_are_orthonormal():
    model = nn.Sequential(nn.Conv2d(12, 20, 5))
    tensors = factors(da.attach(model, da.FLoRA(rank=4, kernel_rank=2), "0"))
    assert not tensors["core"].any()
    for factor in ("up", "kernel_0", "kernel_1"):
        torch.testing.assert_close(tensors[factor].T @ tensors[factor], torch.eye(tensors[factor].shape[1]))
    torch.testing.assert_close(tensors["down"] @ tensors["down"].T, torch.eye(4))


def test_the_gaussian_start_is_the_papers():
    model = nn.Sequential(nn.Conv2d(200, 300, 3))
    tensors = factors(da.attach(model, da.FLoRA(rank=16, init="gaussian"), "0"))
    assert not tensors["core"].any()
    for factor in ("up", "down"):
        assert tensors[factor].std().item() == pytest.approx(0.02, rel=0.05)


def test_the_cores_first_gradient_is_no_smaller_than_a_hundredth_of_loras():
    lora = first_gradient(da.LoRA(rank=4), "up")
    assert first_gradient(da.FLoRA(rank=4), "core") >= 0.01 * lora


def test_the_papers_gaussian_start_makes_the_cores_first_gradient_vanish():
    lora = first_gradient(da.LoRA(rank=4), "up")
    assert first_gradient(da.FLoRA(rank=4, init="gaussian"), "core") < 1e-3 * lora


class Sizes(TorchDispatchMode):
    """The number of elements of every tensor that is made; views of the weight are not."""

    def __init__(self, weight):
        super().__init__()
        self.weight_storage = weight.untyped_storage().data_ptr()
        self.numels = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage().data_ptr() != self.weight_storage
            ):
                self.numels.append(tensor.numel())
        return result


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(96, 80), torch.randn(2, 96)),
        (nn.Conv2d(48, 32, 3, padding=1), torch.randn(1, 48, 4, 4)),
        (nn.Conv2d(48, 32, 3, stride=2, padding=1, padding_mode="circular"), torch.randn(1, 48, 4, 4)),
        (nn.Conv2d(96, 80, 1), torch.randn(1, 96, 3, 3)),
    ],
    ids=["linear", "3x3", "3x3-circular-stride", "1x1"],
)
@pytest.mark.parametrize(
    "method", [da.FLoRA(rank=3), da.LoRA(rank=3), da.LoKr(rank=1), da.LoKr(rank=9)], ids=str
)
def test_neither_forward_nor_backward_makes_a_tensor_of_the_weights_size(layer, x, method):
    adapter = da.attach(nn.Sequential(layer), method, "0")
    train(adapter)
    x = x.clone().requires_grad_()
    with Sizes(layer.weight) as sizes:
        layer(x).square().sum().backward()
    da.detach(adapter)
    assert max(sizes.numels) < layer.weight.numel() / 2


@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2}, {"dilation": 2, "padding": 1}], ids=str)
def test_a_convolution_equals_lycoris_tucker_on_the_same_factors(options):
    locon = pytest.importorskip("lycoris.modules.locon")
    model = nn.Sequential(nn.Conv2d(8, 12, 3, **options)).double()
    layer = copy.deepcopy(model[0])
    other = locon.LoConModule("other", layer, 1.0, 4, 8.0, use_tucker=True).double()
    other.apply_to()
    other.lora_up.weight.data.normal_()
    x = torch.randn(2, 8, 7, 7, dtype=torch.float64)
    expected = layer(x)
    expected.square().sum().backward()

    adapter = da.attach(model, da.FLoRA(rank=4, alpha=8.0, kernel_rank=3), "0")
    tensors = factors(adapter)
    with torch.no_grad():
        tensors["core"].copy_(other.lora_mid.weight)
        tensors["up"].copy_(other.lora_up.weight.flatten(1))
        tensors["down"].copy_(other.lora_down.weight.flatten(1))
        tensors["kernel_0"].copy_(torch.eye(3))
        tensors["kernel_1"].copy_(torch.eye(3))
    value = model(x)
    close(value, expected, 1e-10)
    value.square().sum().backward()
    close(tensors["core"].grad, other.lora_mid.weight.grad, 1e-10)
    close(tensors["up"].grad, other.lora_up.weight.grad.flatten(1), 1e-10)
    close(tensors["down"].grad, other.lora_down.weight.grad.flatten(1), 1e-10)


@pytest.mark.parametrize("option", ["rank", "rank_in", "rank_out", "kernel_rank"])
@pytest.mark.parametrize("value", [0, -3, True, 2.0, "4"])
def test_every_rank_is_a_whole_number_of_at_least_one(option, value):
    with pytest.raises(ValueError, match=option):
        da.FLoRA(**{option: value})


def test_an_unknown_start_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="init must be one of orthonormal, gaussian"):
        da.FLoRA(init="normal")
