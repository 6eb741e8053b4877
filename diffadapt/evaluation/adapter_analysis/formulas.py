"""Formulas on the singular vectors of a change of weights, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffadapt.methods.random_init import named_generator

Singular = tuple[Tensor, Tensor, Tensor]  # U (out, n), S (n,), Vh (n, fan_in)


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values ``(n,)`` scaled to sum 1 (Roy and Vetterli 2007): in [1, n],
    n when all are equal; 0 for the zero matrix."""
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values.double() / total
    return float(torch.special.entr(shares).sum().exp())


def numerical_rank(values: Tensor, shape: Sequence[int]) -> int:
    """Singular values above the rounding of float32, in which adapters are trained: of the rest, the
    directions mean nothing."""
    if not len(values):
        return 0
    floor = values[0] * max(shape) * torch.finfo(torch.float32).eps
    return int((values > floor).sum())


def subspace_similarity(dense: Singular, variant: Singular, *, k: int = 5) -> tuple[float, float]:
    """SuperLoRA's ``d_L`` and ``d_R`` (supplement, equations 4 and 5), in [0, 1].

        d_L = |U_dense[:, :k]^T U_variant[:, :k]|_F / sqrt(k)        d_R likewise with the rows of Vh

    The paper writes the norm as ``|.|_2`` and says that the figures converge to 1, which the Frobenius norm
    does and the spectral norm does not. Directions of zero singular values are none: a change of rank r < k
    reaches at most sqrt(r / k).
    """
    counts = [min(k, numerical_rank(s, (u.shape[0], vh.shape[1]))) for u, s, vh in (dense, variant)]
    left = dense[0][:, : counts[0]].T @ variant[0][:, : counts[1]]
    right = dense[2][: counts[0]] @ variant[2][: counts[1]].T
    return tuple(float(overlap.norm()) / math.sqrt(k) for overlap in (left, right))


def relative_distance(dense: Tensor, variant: Tensor) -> float | None:
    """SuperLoRA's ``d_E`` (supplement, equation 6): ``|dense - variant|_F / |dense|_F``: 0 for the same
    change, 1 as far as no change. None where the dense fine-tune changed nothing."""
    norm = dense.norm()
    return float((dense - variant).norm() / norm) if norm > 0 else None


def amplification_factor(weight: Tensor, change: Singular, *, rank: int) -> float | None:
    """The feature amplification factor ``|dW|_F / |U^T W V|_F`` (LoRA, FLoRA's Figure 4).

    ``U`` and ``V`` are the first ``rank`` singular vectors of the change, as far as it has them: how much
    stronger than in ``weight (out, fan_in)`` its directions become. None for no change or weights without
    any share in those directions.
    """
    left, values, right = change
    count = min(rank, numerical_rank(values, weight.shape))
    shared = (left[:, :count].T @ weight.double() @ right[:count].T).norm()
    return float(values.norm() / shared) if count and shared > 0 else None


def alignment(directions: Tensor, vector: Tensor) -> Tensor:
    """|cosine| between each row of ``directions (n, fan_in)``, unit vectors, and ``vector (fan_in,)`` (1LoRA,
    Figure 9). Of two unrelated vectors it is about sqrt(2 / (pi * fan_in))."""
    return (directions @ vector).abs() / vector.norm()


def compression_vectors(fan_in: int, learned: Tensor | None, *, seed: int = 0) -> dict[str, Tensor]:
    """What can turn ``fan_in`` inputs into one number: their sum (1LoRA), a frozen normal vector (VeRA), and
    the one that was learned, where there is one."""
    ones = torch.ones(fan_in, dtype=torch.float64)
    generator = named_generator(seed, "analysis", str(fan_in))
    vectors = {
        "summation": ones,
        "random": torch.randn(fan_in, dtype=torch.float64, generator=generator),
    }
    return vectors if learned is None else vectors | {"learned": learned}
