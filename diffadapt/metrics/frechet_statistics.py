"""Published reference statistics: npz files with mu and sigma (ADM, pytorch-fid)."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from diffadapt.metrics.frechet import Statistics

NOTE = (
    "imported statistics: extractor, resize and images are not known; only the Frechet distance can be taken"
)
SPATIAL = "_s"  # ends the names of ADM's statistics for sFID


def read_all_statistics(path: str | Path) -> dict[str, Statistics]:
    """Statistics for FID and, where stored, for sFID, by their roles in `metrics.feature_set.STATISTICS`."""
    statistics = {"statistics": read_statistics(path)}
    with np.load(path, allow_pickle=False) as content:
        has_spatial = f"mu{SPATIAL}" in content
    if has_spatial:
        statistics["spatial_statistics"] = read_statistics(path, ending=SPATIAL)
    return statistics


def read_statistics(path: str | Path, *, ending: str = "") -> Statistics:
    """Mean and covariance of a reference set, for the Frechet distances only.

    Args:
        path: npz with `mu` (D,) and `sigma` (D, D); nothing in it is unpickled. The number of images is not
            stored.
        ending: of the names in the file: "_s" for the statistics of sFID.

    Raises:
        ValueError: a part is missing or does not fit; names it.
        OSError: the file cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            mean = content[f"mu{ending}"]
            covariance = content[f"sigma{ending}"]
    except KeyError as error:
        raise ValueError(f"{path}: no {error.args[0]}; a file of statistics has mu and sigma") from None
    except (BadZipFile, ValueError, EOFError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no npz of statistics ({error})") from None
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{path}: mu {mean.shape} and sigma {covariance.shape} do not fit: expected (D,) and (D, D)"
        )
    mean = torch.from_numpy(np.asarray(mean, dtype=np.float64))  # (D,)
    covariance = torch.from_numpy(np.asarray(covariance, dtype=np.float64))  # (D, D)
    if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise ValueError(f"{path}: mu or sigma holds NaN or infinity")
    if not torch.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6):
        raise ValueError(f"{path}: sigma is not symmetric, so it is no covariance")
    return Statistics(mean, (covariance + covariance.T) / 2, None, note=NOTE)
