"""Vendi score: the effective number of different images in a set (arXiv 2210.02410), needs no reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffadapt.metrics.checks import Features, as_features
from diffadapt.metrics.intervals import Estimate, half_samples_interval


def vendi(*, features: Features) -> float:
    """Effective number of different images, from 1 (all alike) to n.

        exp(-sum_i l_i log l_i),    l_i the eigenvalues of K / n, K the cosines between rows

    A row of zeros (a ReLU layer may give one) has no direction: all such rows count as alike, and as
    different from every other row.

    Raises:
        ValueError: a feature is NaN.
    """
    return _effective_number(_unit_rows(features))


def vendi_with_interval(*, features: Features, seed: int = 0) -> Estimate:
    """`vendi` and the spread over random halves."""
    rows = _unit_rows(features)
    value = _effective_number(rows)
    interval = half_samples_interval(
        value, lambda half: _effective_number(rows[half]), len(rows), seed=seed, low=1.0
    )
    return Estimate(value, interval)


def _unit_rows(features: Features) -> Tensor:
    """Rows of length 1; zero rows point into a dimension of their own."""
    features = as_features("features", features)
    is_zero = (features == 0).all(dim=1, keepdim=True)
    if is_zero.any():
        features = torch.cat([features, is_zero.to(features.dtype)], dim=1)  # (n, D + 1)
    return normalize(features, dim=1)


def _effective_number(rows: Tensor) -> float:
    """`vendi` of rows (n, D) of length 1."""
    n, width = rows.shape
    # X^T X and X X^T have the same non-zero eigenvalues: the smaller one is decomposed.
    gram = rows.T @ rows if width < n else rows @ rows.T
    shares = torch.linalg.eigvalsh(gram / n).clamp(min=0)
    return float(torch.special.entr(shares).sum().exp())
