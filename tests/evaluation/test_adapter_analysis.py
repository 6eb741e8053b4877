"""Figures of adapters against restatements of the papers' formulas in float64."""

import math

import numpy as np
import pytest
import torch
from helpers.models import denoiser
from helpers.perturb import perturb

import diffadapt as da
from diffadapt.evaluation.adapter_analysis import (
    alignment,
    amplification_factor,
    analyse,
    compression_vectors,
    effective_rank,
    numerical_rank,
    relative_distance,
    subspace_similarity,
    summary,
)


def svd(matrix):
    return torch.linalg.svd(matrix, full_matrices=False)


def random_matrix(rows=12, columns=9, rank=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    options = {"dtype": torch.float64, "generator": generator}
    if rank is None:
        return torch.randn(rows, columns, **options)
    return torch.randn(rows, rank, **options) @ torch.randn(rank, columns, **options)


def change_of(adapter, site):
    """``W' - W`` as a matrix, from the merged weight of a float64 base."""
    return (adapter.adapted_weight(site) - adapter.layer_states[site].base()).flatten(1)


def test_similarities_and_distance_are_superloras_equations_4_to_6():
    dense, variant, k = random_matrix(seed=1), random_matrix(seed=2), 5
    left, right = subspace_similarity(svd(dense), svd(variant), k=k)
    (u1, _, v1), (u2, _, v2) = (np.linalg.svd(m.numpy(), full_matrices=False) for m in (dense, variant))
    assert left == pytest.approx(np.sqrt(((u1[:, :k].T @ u2[:, :k]) ** 2).sum() / k), rel=1e-12)
    assert right == pytest.approx(np.sqrt(((v1[:k] @ v2[:k].T) ** 2).sum() / k), rel=1e-12)
    expected = np.sqrt(((dense - variant).numpy() ** 2).sum() / (dense.numpy() ** 2).sum())
    assert relative_distance(dense, variant) == pytest.approx(expected, rel=1e-12)


def test_the_dense_change_itself_has_similarity_1_and_distance_0_and_no_change_0_and_1():
    dense, nothing = random_matrix(), torch.zeros(12, 9, dtype=torch.float64)
    assert subspace_similarity(svd(dense), svd(dense)) == pytest.approx((1, 1))
    assert relative_distance(dense, dense) == 0
    assert subspace_similarity(svd(dense), svd(nothing)) == (0, 0)
    assert relative_distance(dense, nothing) == 1
    assert relative_distance(nothing, dense) is None


def test_a_change_of_small_rank_is_compared_in_its_own_directions_only():
    dense = random_matrix(seed=3)
    u, s, vh = svd(dense)
    cut = u[:, :2] * s[:2] @ vh[:2]
    assert subspace_similarity(svd(dense), svd(cut), k=5) == pytest.approx((math.sqrt(2 / 5),) * 2)


def test_effective_rank_of_equal_values_is_their_number_and_of_one_value_1():
    assert effective_rank(torch.full((7,), 0.3, dtype=torch.float64)) == pytest.approx(7)
    assert effective_rank(torch.tensor([5.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(4)) == 0
    values = np.array([3.0, 2.0, 1.0]) / 6
    assert effective_rank(torch.tensor([3.0, 2.0, 1.0])) == pytest.approx(
        np.exp(-(values * np.log(values)).sum())
    )


def test_amplification_is_the_norm_over_what_the_weight_has_in_those_directions():
    weight, change, rank = random_matrix(seed=4), random_matrix(rank=4, seed=5), 3
    u, _, vh = np.linalg.svd(change.numpy(), full_matrices=False)
    shared = np.linalg.norm(u[:, :rank].T @ weight.numpy() @ vh[:rank].T)
    expected = np.linalg.norm(change.numpy()) / shared
    assert amplification_factor(weight, svd(change), rank=rank) == pytest.approx(expected, rel=1e-12)
    # directions beyond the change's own rank do not count
    beyond = amplification_factor(weight, svd(change), rank=9)
    assert beyond == pytest.approx(amplification_factor(weight, svd(change), rank=4), rel=1e-12)
    assert amplification_factor(weight, svd(torch.zeros_like(change)), rank=3) is None
    assert amplification_factor(torch.zeros_like(weight), svd(change), rank=3) is None


def test_a_weight_scaled_by_two_in_its_own_directions_is_amplified_by_one():
    weight = random_matrix(rank=2, seed=6)
    assert amplification_factor(weight, svd(weight), rank=2) == pytest.approx(1)


def test_alignment_finds_the_summation_direction_and_chance_for_unrelated_ones():
    fan_in = 400
    ones = torch.ones(fan_in, dtype=torch.float64)
    directions = torch.stack([ones / ones.norm(), torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(200)])
    vectors = compression_vectors(fan_in, None)
    assert set(vectors) == {"summation", "random"}
    assert alignment(directions, vectors["summation"]).tolist() == pytest.approx([1, 0])
    assert torch.equal(vectors["random"], compression_vectors(fan_in, None)["random"])
    frame = torch.linalg.qr(random_matrix(fan_in, fan_in, seed=7))[0].T
    chance = alignment(frame, vectors["random"]).mean()
    assert chance == pytest.approx(math.sqrt(2 / (math.pi * fan_in)), rel=0.1)


def test_numerical_rank_ignores_the_rounding_of_float32():
    rounded = random_matrix(rank=3).float().double()
    assert numerical_rank(svd(rounded)[1], rounded.shape) == 3
    assert numerical_rank(torch.zeros(5), (5, 5)) == 0


@pytest.fixture
def fine_tuned():
    """A float64 model with a dense fine-tune and adapters of several methods, all attached."""
    model = denoiser().double()
    targets = "attention+conv"
    dense = perturb(da.attach(model, da.Full(), targets, name="dense"), seed=9)
    methods = ("lora(rank=3)", "flora(rank=3)", "liera(rank=2)", "1lora", "dora(rank=2)")
    adapters = {name: perturb(da.attach(model, da.make_method(name), targets, name=name)) for name in methods}
    return adapters, dense


def test_every_layers_figures_follow_from_its_merged_weight(fine_tuned):
    adapters, dense = fine_tuned
    for label, layers in analyse(adapters, dense, k=3, rank=2).items():
        assert len(layers) == len(adapters[label].sites)
        for own in layers:
            change, target = change_of(adapters[label], own.name), change_of(dense, own.name)
            weight = dense.layer_states[own.name].base().flatten(1)
            assert own.norm == pytest.approx(change.norm().item(), rel=1e-9)
            assert own.relative_norm == pytest.approx((change.norm() / weight.norm()).item(), rel=1e-9)
            assert own.effective_rank == pytest.approx(effective_rank(torch.linalg.svdvals(change)), rel=1e-6)
            expected = amplification_factor(weight, svd(change), rank=2)
            assert own.amplification == pytest.approx(expected, rel=1e-6)
            similarity = subspace_similarity(svd(target), svd(change), k=3)
            assert (own.left, own.right) == pytest.approx(similarity, rel=1e-6)
            assert own.distance == pytest.approx(((target - change).norm() / target.norm()).item(), rel=1e-9)


def test_1lora_is_aligned_with_the_summation_and_the_learned_vector_is_the_adapters_first_direction(
    fine_tuned,
):
    adapters, dense = fine_tuned
    for own in analyse({"1lora": adapters["1lora"]})["1lora"]:
        assert own.alignment["summation"] == pytest.approx([1])  # its only direction
        assert "learned" not in own.alignment
        assert own.left is own.right is own.distance is None
    lora = adapters["lora(rank=3)"]
    for own in analyse({"lora": lora}, dense, directions=4)["lora"]:
        directions = svd(change_of(dense, own.name))[2][:4]
        learned = svd(change_of(lora, own.name))[2][0]
        assert own.alignment["learned"] == pytest.approx((directions @ learned).abs().tolist(), abs=1e-9)
        assert len(own.alignment["summation"]) == len(own.alignment["random"]) == len(directions)


def test_norms_have_no_directions_and_biases_count():
    model = denoiser()
    norms = perturb(da.attach(model, da.Norms(), "norm", name="norms"))
    biases = perturb(da.attach(model, da.BitFit(), "attention", name="biases"))
    figures = analyse({"norms": norms, "biases": biases})
    for own in figures["norms"]:
        assert own.norm > 0
        assert own.effective_rank is own.amplification is None
        assert own.alignment == {}
    for own in figures["biases"]:
        trained = biases.adapted_bias(own.name) - biases.layer_states[own.name].base_bias()
        assert own.bias_norm == pytest.approx(trained.norm().item(), rel=1e-5)
        assert own.norm == own.effective_rank == 0
        assert own.amplification is None


def test_the_summary_is_the_mean_over_layers_at_the_methods_own_rank(fine_tuned):
    adapters, _ = fine_tuned
    for label, rank in (("lora(rank=3)", 3), ("flora(rank=3)", 3), ("1lora", 8)):
        layers = analyse({label: adapters[label]}, rank=rank)[label]
        means = summary(adapters[label])
        assert means["change_norm"] == pytest.approx(sum(own.norm for own in layers) / len(layers), rel=1e-9)
        expected = sum(own.amplification for own in layers) / len(layers)
        assert means["amplification"] == pytest.approx(expected, rel=1e-9)


def test_an_adapter_that_changes_nothing_yet_has_a_norm_of_zero_and_no_amplification():
    adapter = da.attach(denoiser(), da.LoRA(rank=2), "attention")
    assert summary(adapter) == {"change_norm": 0.0}


def test_a_dense_fine_tune_of_other_layers_is_refused():
    model = denoiser()
    dense = da.attach(model, da.Full(), "conv", name="dense")
    lora = da.attach(model, da.LoRA(rank=2), "attention")
    with pytest.raises(ValueError, match="A and the dense fine-tune change no weight in common"):
        analyse({"A": lora}, dense)
