"""The projection, against matrices written out."""

import hashlib

import pytest
import torch
from scipy.linalg import hadamard
from torch.utils.flop_counter import FlopCounterMode

from diffadapt.methods.grouped.fastfood import (
    draw_projection,
    padded_size,
    project,
    walsh_hadamard,
)

SIZES = [(5, 5), (7, 30), (30, 7), (64, 64), (65, 64), (1, 3), (1, 1), (33, 300)]
LINEAR = ("linear", "linear_v2")


def dense_projection(inputs, outputs, drawn):
    """``H' diag[G] Pi H diag[B]`` as a matrix ``(inputs, outputs)``, with scipy's Hadamard matrix."""
    size = padded_size(inputs, outputs)
    h = torch.tensor(hadamard(size), dtype=torch.float64) / size**0.5
    shuffle = torch.zeros(size, size, dtype=torch.float64)
    shuffle[drawn["permutation"].long(), torch.arange(size)] = 1
    mixed = h[:inputs] @ torch.diag(drawn["gauss"]) @ shuffle @ h[:, :outputs]
    return mixed @ torch.diag(drawn["last"])


@pytest.mark.parametrize("bits", range(10))
def test_the_transform_is_the_hadamard_matrix(bits):
    matrix = torch.tensor(hadamard(2**bits), dtype=torch.float64)
    x = torch.randn(2**bits, dtype=torch.float64)
    torch.testing.assert_close(walsh_hadamard(x), x @ matrix, rtol=0, atol=1e-12)


def test_the_transform_costs_n_log_n():
    def operations(bits):
        with FlopCounterMode(display=False) as counter:
            walsh_hadamard(torch.zeros(2**bits))
        return counter.get_total_flops()

    for bits in (8, 12, 16, 20):
        assert operations(bits) == 2 * 16 * 2**bits * bits / 4


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("projection", LINEAR)
def test_linear_projections_are_their_matrices(sizes, projection):
    drawn = draw_projection(*sizes, projection, seed=1)
    x = torch.randn(sizes[0], dtype=torch.float64)
    expected = x @ dense_projection(*sizes, drawn)
    torch.testing.assert_close(project(x, drawn, projection), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("projection", LINEAR)
def test_nonlinear_projections_shrink_the_linear_ones(sizes, projection):
    drawn = draw_projection(*sizes, "non" + projection, seed=1)
    x = torch.randn(sizes[0], dtype=torch.float64)
    linear = x @ dense_projection(*sizes, drawn)
    expected = torch.nn.functional.tanhshrink(linear)
    torch.testing.assert_close(project(x, drawn, "non" + projection), expected, rtol=1e-12, atol=1e-12)


def test_shuffling_moves_every_entry_once():
    drawn = draw_projection(9, 9, "shuffle", seed=1)
    assert drawn.keys() == {"permutation"}
    x = torch.arange(9.0)
    shuffled = project(x, drawn, "shuffle")
    assert not torch.equal(shuffled, x)
    assert torch.equal(shuffled.sort().values, x)


@pytest.mark.parametrize("projection", ["shuffle", *LINEAR, "nonlinear", "nonlinear_v2"])
def test_gradients_are_those_of_finite_differences(projection):
    inputs = 12 if projection == "shuffle" else 6
    drawn = draw_projection(inputs, 12, projection, seed=1)
    x = torch.randn(inputs, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: project(x, drawn, projection), x)


def test_signs_and_normal_numbers_have_their_sizes_and_values():
    drawn = draw_projection(100, 1000, "linear", seed=1)
    assert {key: tuple(value.shape) for key, value in drawn.items()} == {
        "permutation": (1024,),
        "gauss": (1024,),
        "last": (1000,),
    }
    assert set(drawn["last"].tolist()) == {-1.0, 1.0}
    second = draw_projection(100, 1000, "linear_v2", seed=1)
    assert second["last"].unique().numel() == 1000
    assert torch.equal(second["gauss"], drawn["gauss"])


def test_there_is_no_divisor():
    # E |y|^2 = |x|^2 outputs / 2^n
    x = torch.randn(100, dtype=torch.float64)
    energies = [
        project(x, draw_projection(100, 1000, "linear", seed), "linear").square().sum() for seed in range(50)
    ]
    assert torch.stack(energies).mean().item() == pytest.approx(
        x.square().sum().item() * 1000 / 1024, rel=0.05
    )


def test_every_machine_draws_the_same():
    # bits recorded on x86-64; a change would make stored adapters unreadable
    drawn = draw_projection(50, 120, "linear_v2", seed=3)
    digest = hashlib.sha256()
    for key in ("permutation", "gauss", "last"):
        digest.update(drawn[key].to(torch.float32 if key != "permutation" else torch.int32).numpy().tobytes())
    assert digest.hexdigest()[:16] == "260c7155186e66f5"


def test_seed_and_sizes_decide():
    first = draw_projection(50, 120, "linear", seed=3)["gauss"]
    assert torch.equal(first, draw_projection(50, 120, "linear", seed=3)["gauss"])
    assert not torch.equal(first, draw_projection(50, 120, "linear", seed=4)["gauss"])
    assert not torch.equal(first, draw_projection(50, 121, "linear", seed=3)["gauss"])
