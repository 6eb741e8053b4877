"""Formulas on the singular vectors of a weight change, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffadapt.methods.random_init import named_generator

Singular = tuple[Tensor, Tensor, Tensor]  # U (out, n), S (n,), Vh (n, fan_in)


def effective_rank(values: Tensor) -> float:
    """The effective rank of a matrix: in [1, n], n when all singular values are equal; 0 for the zero matrix.

        exp(-sum_i p_i log p_i),    p_i = s_i / sum_j s_j

    Args:
        values: singular values (n,).

    Source: Roy and Vetterli, 2007.
    """
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values.double() / total
    return float(torch.special.entr(shares).sum().exp())


def numerical_rank(values: Tensor, shape: Sequence[int]) -> int:
    """The number of singular values above the rounding of float32, in which adapters are trained.

    The directions of smaller ones mean nothing.

    Args:
        values: singular values (n,), largest first.
        shape: of the matrix.
    """
    if not len(values):
        return 0
    # the threshold of numpy's and torch's matrix_rank
    floor = values[0] * max(shape) * torch.finfo(torch.float32).eps
    return int((values > floor).sum())


def subspace_similarity(dense: Singular, variant: Singular, *, k: int = 5) -> tuple[float, float]:
    """SuperLoRA's `d_L` and `d_R`, in [0, 1].

        d_L = |U_dense[:, :k]^T U_variant[:, :k]|_F / sqrt(k)
        d_R = |Vh_dense[:k] Vh_variant[:k]^T|_F / sqrt(k)

    The paper writes the norm as `|.|_2` and says that the values converge to 1, which holds for the Frobenius
    norm and not for the spectral norm. Directions of zero singular values do not count: a change of rank
    r < k reaches at most sqrt(r / k).

    Args:
        dense: of the dense fine-tune's change.
        variant: of the adapter's change.
        k: singular vectors compared.

    Source: SuperLoRA, supplement, equations 4 and 5.
    """
    dense_u, dense_values, dense_vh = dense
    variant_u, variant_values, variant_vh = variant
    shape = (dense_u.shape[0], dense_vh.shape[1])
    k_dense = min(k, numerical_rank(dense_values, shape))
    k_variant = min(k, numerical_rank(variant_values, shape))
    # cosines between the output directions of both, and between their input directions
    output_cosines = dense_u[:, :k_dense].T @ variant_u[:, :k_variant]  # (k_dense, k_variant)
    input_cosines = dense_vh[:k_dense] @ variant_vh[:k_variant].T  # (k_dense, k_variant)
    return float(output_cosines.norm()) / math.sqrt(k), float(input_cosines.norm()) / math.sqrt(k)


def relative_distance(dense: Tensor, variant: Tensor) -> float | None:
    """SuperLoRA's `d_E`: `|dense - variant|_F / |dense|_F`.

    0 for the same change, 1 for one as far off as no change. None where the dense fine-tune changed nothing.

    Source: SuperLoRA, supplement, equation 6.
    """
    norm = dense.norm()
    return float((dense - variant).norm() / norm) if norm > 0 else None


def amplification_factor(weight: Tensor, change: Singular, *, rank: int) -> float | None:
    """The feature amplification factor: how much stronger the change's directions are in it than in `weight`.

        |dW|_F / |U^T W V|_F

    Args:
        weight: W (out, fan_in).
        change: of dW; U and V are its first `rank` singular vectors, as far as it has them.
        rank: number of directions.

    Returns:
        The factor; None without a change, or where the weight has no share in its directions.

    Source: LoRA, section 7.3; FLoRA, Figure 4.
    """
    u, singular_values, vh = change
    count = min(rank, numerical_rank(singular_values, weight.shape))
    shared_norm = (u[:, :count].T @ weight.double() @ vh[:count].T).norm()  # |U^T W V|_F
    if not count or not shared_norm > 0:
        return None
    return float(singular_values.norm() / shared_norm)  # |dW|_F is the norm of its singular values


def alignment(directions: Tensor, vector: Tensor) -> Tensor:
    """|cosine| between each direction and a vector, (n,); about sqrt(2 / (pi fan_in)) if they are unrelated.

    Args:
        directions: (n, fan_in), unit vectors.
        vector: (fan_in,).

    Source: 1LoRA, Figure 9.
    """
    return (directions @ vector).abs() / vector.norm()


def compression_vectors(fan_in: int, learned: Tensor | None, *, seed: int = 0) -> dict[str, Tensor]:
    """Vectors that turn `fan_in` inputs into one number, by name, each (fan_in,).

    "summation" is 1LoRA's, "random" a frozen normal vector as VeRA has them, "learned" the given one.

    Args:
        fan_in: number of inputs.
        learned: a trained vector; None where there is none.
        seed: of the random vector.
    """
    generator = named_generator(seed, "analysis", str(fan_in))
    vectors = {
        "summation": torch.ones(fan_in, dtype=torch.float64),
        "random": torch.randn(fan_in, dtype=torch.float64, generator=generator),
    }
    if learned is not None:
        vectors["learned"] = learned
    return vectors
