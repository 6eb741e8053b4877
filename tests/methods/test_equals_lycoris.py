"""Methods that LyCORIS has, grouped convolutions included: same outputs, gradients and merges."""

import copy

import pytest
import torch
from helpers.originals import assert_same, flat, layer, randomized, same
from lycoris.functional.general import factorization
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule

import diffadapt as da
from diffadapt.methods.site import Site

KINDS = ("linear", "conv", "conv-1x1", "conv-grouped")


def module(cls, base, **options):
    """Their module over a copy of ``base``, in float64, its factors random."""
    theirs = cls("layer", copy.deepcopy(base), multiplier=1.0, **options).double()
    randomized([p for p in theirs.parameters() if p.requires_grad])
    return theirs


def chained(theirs, *names):
    """Their tensors by our names, matrices from convolution kernels."""
    return {ours: (dict(theirs.named_parameters())[name], flat) for ours, name in names}


@pytest.mark.parametrize("kind", KINDS)
def test_locon_is_lora(kind):
    base, x = layer(kind)
    theirs = module(LoConModule, base, lora_dim=4, alpha=6)
    tensors = chained(theirs, ("up", "lora_up.weight"), ("down", "lora_down.weight"))
    assert_same(base, da.LoRA(rank=4, alpha=6), x, theirs, tensors)


@pytest.mark.parametrize("kind", ["conv", "conv-grouped"])
def test_locon_with_tucker_is_flora_with_the_whole_kernel_in_its_core(kind):
    base, x = layer(kind)
    theirs = module(LoConModule, base, lora_dim=4, alpha=6, use_tucker=True)
    rows, columns = (torch.eye(3, dtype=torch.float64).requires_grad_() for _ in range(2))
    names = (("up", "lora_up.weight"), ("down", "lora_down.weight"))
    tensors = chained(theirs, *names) | {"core": (theirs.lora_mid.weight, same)}

    def forward(value):  # the two kernel factors, which theirs lacks, take part as identities
        core = torch.einsum("abcd,hc,wd->abhw", theirs.lora_mid.weight, rows, columns)
        return torch.func.functional_call(theirs, {"lora_mid.weight": core}, (value,))

    tensors |= {"kernel_0": (rows, same), "kernel_1": (columns, same)}
    assert_same(base, da.FLoRA(rank=4, kernel_rank=3, alpha=6), x, forward, tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_loha(kind):
    base, x = layer(kind)
    theirs = module(LohaModule, base, lora_dim=2, alpha=3)
    tensors = chained(
        theirs,
        ("up_1", "hada_w1_a"),
        ("down_1", "hada_w1_b"),
        ("up_2", "hada_w2_a"),
        ("down_2", "hada_w2_b"),
    )
    assert_same(base, da.LoHa(rank=2, alpha=3), x, theirs, tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_lokr(kind):
    base, x = layer(kind)
    theirs = module(LokrModule, base, lora_dim=1, alpha=3)
    tensors = chained(theirs, ("left", "lokr_w1"), ("up", "lokr_w2_a"), ("down", "lokr_w2_b"))
    assert_same(base, da.LoKr(rank=1, alpha=3), x, theirs, tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_lokr_with_a_dense_right_side_has_multiplier_one(kind):
    base, x = layer(kind)
    theirs = module(LokrModule, base, lora_dim=9, alpha=3)
    tensors = chained(theirs, ("left", "lokr_w1"), ("right", "lokr_w2"))
    assert_same(base, da.LoKr(rank=9, alpha=3), x, theirs, tensors)


def test_lokr_splits_every_width_as_lycoris_does():
    for factor in (-1, 1, 2, 3, 4, 6, 8, 12, 16, 32):
        method = da.LoKr(rank=1, factor=factor)
        for width in range(1, 400):
            small, large = factorization(width, factor)
            shapes = method.trained_tensors(Site("layer", "linear", (width, width)))
            assert shapes["left"] == (small, small)
            assert shapes.get("right", (large, large)) == (large, large)
