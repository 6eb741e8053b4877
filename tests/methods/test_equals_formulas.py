"""Methods without a package to compare with, against restatements of their papers' formulas and codes."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.method_cases import Model, close
from helpers.originals import assert_same, layer, randomized, same
from torch import Tensor

import diffadapt as da


def free(*shape: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (0.5 * torch.randn(shape, dtype=torch.float64, generator=generator)).requires_grad_()


def apply(base, x, weight, bias="own"):
    """The layer with another weight and bias."""
    bias = base.bias if isinstance(bias, str) else bias
    if isinstance(base, torch.nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, base.stride, base.padding, base.dilation, base.groups)


# MoRA, arXiv 2405.12130: y = x W^T + decompress(M compress(x)), compression and decompression without weights


def wrapped_blocks(x: Tensor, size: int) -> Tensor:
    """The inputs in blocks of ``size``; the last one is filled with the first inputs again."""
    count = math.ceil(x.shape[-1] / size)
    indices = torch.arange(count * size) % x.shape[-1]
    return x[..., indices].reshape(*x.shape[:-1], count, size)


def mora_type_1(x: Tensor, square: Tensor, out: int) -> Tensor:
    shared = sum(wrapped_blocks(x, len(square)).unbind(-2)) @ square.T
    return torch.stack([shared[..., row % len(square)] for row in range(out)], -1)


def mora_type_6(x: Tensor, square: Tensor, out: int) -> Tensor:
    size = len(square)
    turned = []
    for position, block in enumerate(wrapped_blocks(x, size).unbind(-2)):
        pairs = torch.complex(block[..., : size // 2], block[..., size // 2 :])
        angles = position * 10000.0 ** (-2 * torch.arange(size // 2, dtype=torch.float64) / size)
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        turned.append(torch.cat([pairs.real, pairs.imag], -1) @ square.T)
    flat = torch.cat(turned, -1)
    return torch.stack([flat[..., row % flat.shape[-1]] for row in range(out)], -1)


@pytest.mark.parametrize(("width", "out"), [(12, 10), (10, 25), (9, 4), (25, 12)])
@pytest.mark.parametrize(("kind", "formula"), [(1, mora_type_1), (6, mora_type_6)])
def test_mora_of_a_linear_layer(width, out, kind, formula):
    torch.manual_seed(0)
    base, x = torch.nn.Linear(width, out).double(), torch.randn(3, 2, width, dtype=torch.float64)
    size = int(((width + out) * 2) ** 0.5 + 0.5)
    size = size // 2 * 2 if kind == 6 else size
    square = free(size, size)
    theirs = {"square": (square, same)}
    assert_same(
        base, da.MoRA(rank=2, type=kind), x, lambda value: base(value) + formula(value, square, out), theirs
    )


def test_mora_rotates_far_blocks_in_half_precision_too():
    base, x = torch.nn.Linear(1200, 1200, bias=False), torch.randn(3, 1200).bfloat16()
    base.weight.data.zero_()
    model = Model(base.bfloat16())
    square = da.attach(model, da.MoRA(rank=1, type=6), "layer").parts[0].tensors[0]["square"]
    randomized([square])
    exact = mora_type_6(x.double(), square.detach().double(), 1200)
    assert 1200 / len(square) > 24  # blocks
    close(model(x), exact, 0.015)


# Methods of Linear layers on a convolution: the same on every window, channel by channel as the weight


def windows(base, x: Tensor) -> Tensor:
    """What each output of a convolution sees ``(batch, height, width, fan_in)``."""
    size = base(x).shape[2:]
    found = F.unfold(x, base.kernel_size, padding=base.padding, stride=base.stride)
    return found.transpose(1, 2).unflatten(1, size)


def on_windows(base, branch):
    """The convolution plus a branch ``(..., fan_in) -> (..., out)``."""
    return lambda value: base(value) + branch(windows(base, value)).movedim(-1, 1)


@pytest.mark.parametrize(("kind", "formula"), [(1, mora_type_1), (6, mora_type_6)])
def test_mora_of_a_convolution(kind, formula):
    base, x = layer("conv")
    size = int(((72 + 6) * 2) ** 0.5 + 0.5) // 2 * 2
    square = free(size, size)
    original = on_windows(base, lambda rows: formula(rows, square, 6))
    assert_same(base, da.MoRA(rank=2, type=kind), x, original, {"square": (square, same)})


def test_vera_of_a_convolution():
    base, x = layer("conv")
    up, down, outer, inner = free(6, 5).detach(), free(5, 72).detach(), free(6), free(5)
    original = on_windows(base, lambda rows: outer * ((inner * (rows @ down.T)) @ up.T))
    theirs = {"out_scale": (outer, same), "rank_scale": (inner, same)}
    assert_same(base, da.VeRA(rank=5), x, original, theirs, frozen={"up_6x72": up, "down_6x72": down})


def test_1lora_with_a_random_compression_of_a_convolution():
    base, x = layer("conv")
    vector, weights = free(6), torch.randn(72, dtype=torch.float64)
    original = on_windows(base, lambda rows: vector * (rows @ weights)[..., None])
    method, theirs = da.OneLoRA(compression="random"), {"vector": (vector, same)}
    assert_same(base, method, x, original, theirs, frozen={"weights_72": weights})


# LieRA, arXiv 2504.00851, equations 5 and 6, and ConvLoRA's way to see a convolution as a matrix


@pytest.mark.parametrize("order", ["first", "exp"])
@pytest.mark.parametrize("kind", ["linear", "conv", "conv-grouped"])
@pytest.mark.parametrize("reshape", ["peft", "loralib"])
def test_liera(kind, order, reshape):
    base, x = layer(kind)
    out, width = base.weight.shape[0], base.weight[0].numel()
    up, down = free(out, 2), free(2, width)
    if reshape == "loralib" and kind != "linear":  # B (out / groups * k, r k), A (r k, in * k)
        groups, k = base.groups, 3
        up, down = free(out // groups * k, 2 * k), free(2 * k, base.in_channels * k)

    def forward(value):
        element = 1.5 * (up @ down).view(base.weight.shape)
        factor = 1 + element if order == "first" else torch.exp(element)
        return apply(base, value, base.weight * factor)

    method = da.LieRA(rank=2, alpha=3, order=order, conv_reshape=reshape)
    assert_same(base, method, x, forward, {"up": (up, same), "down": (down, same)})


@pytest.mark.parametrize("kind", ["conv", "conv-grouped"])
def test_lora_of_a_convolution_as_in_loralib(kind):
    base, x = layer(kind)
    up, down = free(base.out_channels // base.groups * 3, 2 * 3), free(2 * 3, base.in_channels * 3)
    method = da.LoRA(rank=2, alpha=1, conv_reshape="loralib")
    assert_same(
        base,
        method,
        x,
        lambda value: apply(base, value, base.weight + 0.5 * (up @ down).view(base.weight.shape)),
        {"up": (up, same), "down": (down, same)},
    )


# FLoRA, arXiv 2405.14739, equations 5 to 9: tensorly's Tucker product


@pytest.mark.parametrize("kind", ["linear", "conv", "conv-1x1", "conv-grouped"])
def test_flora_is_the_tucker_product_of_tensorly(kind):
    tensorly = pytest.importorskip("tensorly")
    base, x = layer(kind)
    out, width, *kernel = base.weight.shape
    kernel_ranks = [min(2, size) for size in kernel]
    core, up, down = free(4, 3, *kernel_ranks), free(out, 4), free(3, width)
    sides = [
        free(size, rank, seed=axis)
        for axis, (size, rank) in enumerate(zip(kernel, kernel_ranks, strict=True))
    ]
    theirs = {"core": (core, same), "up": (up, same), "down": (down, same)}
    theirs |= {f"kernel_{axis}": (side, same) for axis, side in enumerate(sides)}

    def forward(value):
        with tensorly.backend_context("pytorch"):
            change = tensorly.tucker_to_tensor((core, [up, down.T, *sides]))
        return apply(base, value, base.weight + 2.5 * change)

    method = da.FLoRA(rank_out=4, rank_in=3, kernel_rank=2, scale=2.5)
    assert_same(base, method, x, forward, theirs)


# 1LoRA, arXiv 2503.08333, listing 1; for a convolution the sum over every window, here by unfolding


def test_1lora_of_a_linear_layer():
    base, x = layer("linear")
    vector = free(10)
    assert_same(
        base,
        da.OneLoRA(),
        x,
        lambda value: base(value) + vector * value.sum(-1, keepdim=True),
        {"vector": (vector, same)},
    )


@pytest.mark.parametrize("kind", ["conv", "conv-1x1", "conv-grouped"])
def test_1lora_of_a_convolution(kind):
    base, x = layer(kind)
    out, groups = base.out_channels, base.groups
    vector = free(out)

    def forward(value):
        y = base(value)
        windows = F.unfold(value, base.kernel_size, padding=base.padding, stride=base.stride)
        sums = windows.unflatten(1, (groups, -1)).sum(2).repeat_interleave(out // groups, 1)
        return y + vector[:, None, None] * sums.reshape(y.shape)

    assert_same(base, da.OneLoRA(), x, forward, {"vector": (vector, same)})


@pytest.mark.parametrize("groups", [0, 1, 2], ids=["linear", "conv", "conv-grouped"])
def test_1lora_adds_up_more_than_float16_can_hold(groups):
    generator = torch.Generator().manual_seed(0)
    base = torch.nn.Conv2d(2048, 8, 3, groups=groups) if groups else torch.nn.Linear(8192, 8)
    x = (40 + torch.randn(2, *((2048, 3, 3) if groups else (8192,)), generator=generator)).half()
    adapter = da.attach(base.half(), da.OneLoRA(), "all")
    (vector,) = adapter.parameters()
    with torch.no_grad():
        base.weight.zero_(), base.bias.zero_(), vector.copy_(torch.linspace(0.001, 0.01, 8))
    sums = x.double().reshape(2, max(groups, 1), -1).sum(2)
    assert sums.min() > 65_504
    x.requires_grad_()
    y = base(x).flatten(1)
    each = sums.repeat_interleave(8 // max(groups, 1), 1)
    close(y.double(), vector.double() * each, 2e-3)
    (y.float() / 1024).sum().backward()
    close(vector.grad.double(), each.sum(0) / 1024, 2e-3)
    expected = vector.detach().double().reshape(max(groups, 1), -1).sum(1) / 1024
    seen = x.grad.double().reshape(2, len(expected), -1)
    close(seen, expected[None, :, None].expand_as(seen), 2e-3)


def test_1lora_with_a_random_compression():
    base, x = layer("linear")
    vector, weights = free(10), torch.randn(12, dtype=torch.float64)
    theirs = {"vector": (vector, same)}
    assert_same(
        base,
        da.OneLoRA(compression="random"),
        x,
        lambda value: base(value) + vector * (value @ weights)[..., None],
        theirs,
        frozen={"weights_12": weights},
    )


# BitFit, arXiv 2106.10199; DiffFit, arXiv 2304.06648


@pytest.mark.parametrize("kind", ["linear", "conv-grouped"])
@pytest.mark.parametrize(
    "method", [da.BitFit(), da.Gamma(), da.DiffFit(), da.DiffFit(gamma=False), da.Full()], ids=str
)
def test_vectors_and_full_fine_tuning(kind, method):
    base, x = layer(kind)
    gamma, beta, weight = (
        free(base.bias.shape[0], seed=1),
        free(base.bias.shape[0], seed=2),
        free(*base.weight.shape),
    )
    trailing = (1,) * (x.dim() - 2) if kind != "linear" else ()
    known = {"bias": (beta, same), "beta": (beta, same), "gamma": (gamma, same), "weight": (weight, same)}
    used = {da.BitFit: ["bias"], da.Gamma: ["gamma"], da.Full: ["weight", "bias"]}
    names = used.get(type(method), ["gamma", "beta"] if getattr(method, "gamma", False) else ["beta"])

    def forward(value):
        bias = base.bias + beta if {"bias", "beta"} & set(names) else base.bias
        y = apply(base, value, base.weight + weight if "weight" in names else base.weight, bias)
        return y * gamma.reshape(-1, *trailing) if "gamma" in names else y

    assert_same(base, method, x, forward, {name: known[name] for name in names})


@pytest.mark.parametrize("norm", [torch.nn.LayerNorm(8), torch.nn.GroupNorm(2, 8)], ids=["layer", "group"])
@pytest.mark.parametrize("method", [da.Norms(), da.DiffFit()], ids=str)
def test_norms(norm, method):
    base = norm.double()
    x = torch.randn(2, 8, 3, 8, dtype=torch.float64)
    weight, bias = free(8, seed=1), free(8, seed=2)

    def forward(value):
        return torch.func.functional_call(
            base, {"weight": base.weight + weight, "bias": base.bias + bias}, (value,)
        )

    assert_same(base, method, x, forward, {"weight": (weight, same), "bias": (bias, same)})


def test_the_start_of_pissa_is_the_best_approximation_of_its_rank():
    base, _ = layer("conv")
    model = torch.nn.Sequential(base)
    tensors = da.attach(model, da.PiSSA(rank=3), "0").parts[0].tensors[0]
    left, values, right = torch.linalg.svd(base.weight.flatten(1).detach())
    close(tensors["up"] @ tensors["down"], (left[:, :3] * values[:3]) @ right[:3], 1e-10)
