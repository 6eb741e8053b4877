"""LieRA around another method: the readings stated in its docstring, written densely."""

import pytest
import torch
from helpers.originals import assert_same, layer, randomized, same

import diffadapt as da


def frame(base, order, element):
    """The weight changed by an element of the Lie algebra."""
    return base.weight * (1 + element if order == "first" else torch.exp(element))


def affine(base, x, weight):
    return torch.func.functional_call(base, {"weight": weight}, (x,))


def factors(base, rank=2):
    out, width = base.weight.flatten(1).shape
    values = [
        torch.empty(shape, dtype=torch.float64).requires_grad_() for shape in ((out, rank), (rank, width))
    ]
    randomized(values)
    return values


@pytest.mark.parametrize("order", ["first", "exp"])
@pytest.mark.parametrize("kind", ["linear", "conv", "conv-grouped"])
def test_liera_with_dora_renormalises_the_changed_weight(kind, order):
    base, x = layer(kind)
    up, down = factors(base)
    magnitude = (1 + torch.rand(len(up), dtype=torch.float64)).requires_grad_()

    def forward(value):
        changed = frame(base, order, (0.5 * up @ down).view(base.weight.shape)).flatten(1)
        rows = magnitude[:, None] * changed / changed.detach().norm(dim=1, keepdim=True)
        return affine(base, value, rows.view(base.weight.shape))

    theirs = {"up": (up, same), "down": (down, same), "magnitude": (magnitude, same)}
    assert_same(base, da.LieRA(rank=2, scale=0.5, order=order, inner="dora"), x, forward, theirs)


@pytest.mark.parametrize("order", ["first", "exp"])
@pytest.mark.parametrize("kind", ["linear", "conv", "conv-grouped"])
def test_liera_with_pissa_takes_the_change_since_its_start(kind, order):
    base, x = layer(kind)
    (up, down), (start_up, start_down) = factors(base), factors(base)

    def forward(value):
        element = 0.5 * (up @ down - start_up.detach() @ start_down.detach())
        return affine(base, value, frame(base, order, element.view(base.weight.shape)))

    theirs = {"up": (up, same), "down": (down, same)}
    frozen = {"start_up": start_up, "start_down": start_down}
    assert_same(
        base, da.LieRA(rank=2, scale=0.5, order=order, inner="pissa"), x, forward, theirs, frozen=frozen
    )


@pytest.mark.parametrize("order", ["first", "exp"])
@pytest.mark.parametrize("kind", ["conv", "conv-grouped"])
def test_liera_with_flora_takes_its_tucker_product(kind, order):
    base, x = layer(kind)
    out, width = base.weight.shape[:2]
    shapes = {
        "core": (3, 3, 2, 2),
        "up": (out, 3),
        "down": (3, width),
        "kernel_0": (3, 2),
        "kernel_1": (3, 2),
    }
    tensors = {key: torch.empty(shape, dtype=torch.float64).requires_grad_() for key, shape in shapes.items()}
    randomized(tensors)

    def forward(value):
        element = 0.5 * torch.einsum("abcd,oa,bi,hc,wd->oihw", *tensors.values())
        return affine(base, value, frame(base, order, element))

    theirs = {key: (tensor, same) for key, tensor in tensors.items()}
    assert_same(base, da.LieRA(rank=3, scale=0.5, order=order, inner="flora"), x, forward, theirs)


@pytest.mark.parametrize("order", ["first", "exp"])
def test_liera_with_flora_of_a_linear_layer_takes_the_product_of_three(order):
    base, x = layer("linear")
    shapes = {"up": (10, 3), "core": (3, 3), "down": (3, 12)}
    tensors = {key: torch.empty(shape, dtype=torch.float64).requires_grad_() for key, shape in shapes.items()}
    randomized(tensors)

    def forward(value):
        return affine(
            base, value, frame(base, order, 0.5 * tensors["up"] @ tensors["core"] @ tensors["down"])
        )

    theirs = {key: (tensor, same) for key, tensor in tensors.items()}
    assert_same(base, da.LieRA(rank=3, scale=0.5, order=order, inner="flora"), x, forward, theirs)
