"""The product with several branches, and its lean backward, against plain autograd in float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers.method_cases import close

from diffadapt.algebra.autograd import branch_sum, weight_space_product
from diffadapt.algebra.full_rank import Dense, RelativeChange
from diffadapt.algebra.layer_maps import ConvMap, LinearMap, conv_map
from diffadapt.algebra.low_rank import LowRank


def rand(*shape):
    return torch.randn(shape, dtype=torch.float64)


def gradients(value, leaves):
    return torch.autograd.grad(value.square().sum(), leaves)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)], ids=str)
def test_a_linear_product_and_its_gradients_equal_autograd(shape):
    x = rand(*shape).requires_grad_()
    weight = rand(4, 5)
    bias = rand(4).requires_grad_()
    change = Dense(rand(4, 5).requires_grad_())
    value = weight_space_product(LinearMap(), x, weight, bias, change)
    expected = F.linear(x, weight + change.value, bias)
    close_or_empty(value, expected)
    leaves = (x, bias, change.value)
    for grad, expected_grad in zip(gradients(value, leaves), gradients(expected, leaves), strict=True):
        close_or_empty(grad, expected_grad)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_product_and_its_gradients_equal_autograd(groups):
    layer = ConvMap((2, 1), (1, 0), (1, 2), groups)
    x = rand(2, 4, 6, 7).requires_grad_()
    weight = rand(6, 4 // groups, 3, 2)
    bias = rand(6).requires_grad_()
    change = Dense(rand(6, 4 // groups, 3, 2).requires_grad_())
    value = weight_space_product(layer, x, weight, bias, change)
    expected = F.conv2d(x, weight + change.value, bias, (2, 1), (1, 0), (1, 2), groups)
    close(value, expected, 1e-12)
    leaves = (x, bias, change.value)
    for grad, expected_grad in zip(gradients(value, leaves), gradients(expected, leaves), strict=True):
        close(grad, expected_grad, 1e-12)


def test_dense_and_factored_branches_add_up_with_their_coefficients():
    x = rand(3, 5)
    weight = rand(4, 5)
    bias = rand(4)
    factored = LowRank(rand(4, 2), rand(2, 5))
    dense = Dense(rand(4, 5))
    relative = RelativeChange(weight, LowRank(rand(4, 1), rand(1, 5)))
    terms = [(factored, 2.0, x), (dense, -0.5, x), (relative, 1.0, x)]
    total = weight + 2 * factored.matrix() - 0.5 * dense.value + relative.matrix()
    close(branch_sum(LinearMap(), x, weight, bias, terms), F.linear(x, total, bias), 1e-12)


def test_a_branch_with_an_input_of_its_own_sees_only_that():
    x = rand(3, 5)
    dropped = rand(3, 5)
    weight = rand(4, 5)
    change = Dense(rand(4, 5))
    value = branch_sum(LinearMap(), x, weight, None, [(change, 3.0, dropped)])
    close(value, x @ weight.T + 3 * dropped @ change.value.T, 1e-12)


def test_no_branches_leave_the_bits_of_the_plain_product():
    x = torch.randn(3, 5)
    weight = torch.randn(4, 5)
    bias = torch.randn(4)
    assert torch.equal(branch_sum(LinearMap(), x, weight, bias, []), F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_change_below_the_weights_spacing_still_acts(dtype):
    # ones have a spacing of 2^-7 (bfloat16) or 2^-10 (float16): 1e-4 added to them is lost
    x = torch.tensor([[1.0, -1.0]], dtype=dtype)
    weight = torch.ones(1, 2, dtype=dtype)
    change = Dense(torch.tensor([[1e-4, -1e-4]], requires_grad=True))
    value = weight_space_product(LinearMap(), x, weight, None, change)
    assert value.item() == pytest.approx(2e-4, rel=2**-7)
    value.sum().backward()
    assert change.value.grad.tolist() == [[1.0, -1.0]]
    assert change.value.grad.dtype == torch.float32


def test_the_input_gradient_of_a_half_precision_product_includes_the_change():
    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(1, 1, dtype=torch.bfloat16)
    weight_space_product(LinearMap(), x, weight, None, Dense(torch.full((1, 1), 3e-3))).backward()
    assert x.grad.item() == pytest.approx(3e-3, rel=2**-7)


PADDED = [
    {"padding": "same", "dilation": 2},
    {"padding": "valid"},
    {"padding": (2, 1), "padding_mode": "circular"},
    {"padding": 2, "padding_mode": "reflect", "stride": 2},
    {"padding": 1, "padding_mode": "replicate"},
    {"padding": "same", "padding_mode": "circular"},
    {"padding": (1, 2), "stride": (1, 3), "groups": 2},
]


@pytest.mark.parametrize("options", PADDED, ids=str)
def test_conv_map_reads_a_layers_geometry(options):
    layer = torch.nn.Conv2d(4, 6, (3, 2), **options)
    x = torch.randn(2, 4, 7, 8)
    layer_map, padded = conv_map(layer, x)
    close(layer_map.apply(padded, layer.weight, layer.bias), layer(x), 1e-6)


def close_or_empty(value, expected):
    if expected.numel():
        close(value, expected, 1e-12)
    assert value.shape == expected.shape
