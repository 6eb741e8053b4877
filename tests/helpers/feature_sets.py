"""Features that the tests of metrics share: Gaussian sets in float64 from one seed."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian_sets(
    n_real: int = 120, n_generated: int = 90, *, width: int = 12, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A standard Gaussian set, and one of another mean and scale."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(n_real, width, dtype=torch.float64, generator=generator)
    generated = torch.randn(n_generated, width, dtype=torch.float64, generator=generator)
    return real, 0.3 + 0.9 * generated
