"""Checks of features (shape, rows, NaN, infinity), so that nothing is scored on broken numbers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Features = Tensor | np.ndarray


def as_features(
    name: str, values: Features, *, dtype: torch.dtype | None = torch.float64, min_rows: int = 2
) -> Tensor:
    """A finite matrix (images, features), converted to `dtype` (None: as it is).

    Args:
        name: of the matrix in errors.
        values: tensor or array of any number type, not changed.
        min_rows: rows needed: 2 for a distribution, 1 where each image counts for itself.

    Raises:
        TypeError: `values` is no tensor or array.
        ValueError: it has a wrong shape, too few rows, NaN or infinity.
    """
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(values)
    if not isinstance(values, Tensor):
        raise TypeError(
            f"{name}: expected a tensor or an array (images, features), got {type(values).__name__}"
        )
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"{name}: expected a matrix (images, features), got shape {tuple(values.shape)}")
    if len(values) < min_rows:
        needed = f"at least {min_rows} must be there"
        if min_rows == 2:
            needed = "a distribution needs at least 2"
        raise ValueError(f"{name}: {len(values)} image(s); {needed}")
    refuse_broken_rows(name, values)
    return values.detach().to(dtype or values.dtype)


def refuse_broken_rows(name: str, values: Tensor) -> None:
    """Refuses features that are not finite.

    Raises:
        ValueError: rows hold NaN or infinity; names the first one, and how many there are.
    """
    broken = (~torch.isfinite(values.sum(dim=1))).nonzero().flatten()
    broken = broken[~torch.isfinite(values[broken]).all(dim=1)]  # a sum may overflow where no entry does
    if len(broken):
        raise ValueError(
            f"{name}: features of {len(broken)} of {len(values)} images are NaN or infinite, first in row "
            f"{int(broken[0])}; extract them again, in float32"
        )


def as_pair(
    real: Features, generated: Features, *, dtype: torch.dtype = torch.float64, min_rows: int = 2
) -> tuple[Tensor, Tensor]:
    """Both sets checked, and that their features are of one width."""
    real = as_features("real", real, dtype=dtype, min_rows=min_rows)
    generated = as_features("generated", generated, dtype=dtype, min_rows=min_rows)
    refuse_unequal_widths(real.shape[1], generated.shape[1])
    return real, generated


def refuse_unequal_widths(real: int, generated: int) -> None:
    """Refuses features of two layers or extractors.

    Raises:
        ValueError: the widths differ.
    """
    if real != generated:
        raise ValueError(
            f"features of width {real} (real) and {generated} (generated): use one layer of one extractor"
        )
