"""What `metrics_cost.py` times on the other side: the usual implementations, on the same features."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import scipy.sparse
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from diffadapt.metrics import Statistics


def frechet_by_matrix_root(real: Statistics, generated: Statistics) -> float:
    """As pytorch-fid and clean-fid: scipy's root of the product of the covariances."""
    shift = float((real.mean - generated.mean).square().sum())
    root = scipy.linalg.sqrtm((generated.covariance @ real.covariance).numpy())
    return shift + float(real.covariance.trace() + generated.covariance.trace()) - 2 * np.trace(root).real


def links_row_by_row(features: np.ndarray, k: int = 5) -> float:
    """Number of neighbour links as MSID's authors find them, one row of distances at a time."""
    links = scipy.sparse.lil_matrix((len(features), len(features)))
    squares = (features * features).sum(axis=1)
    for i in range(len(features)):
        nearest = np.argpartition(squares - 2 * features[i].dot(features.T), k + 1)[: k + 1]
        links[i, nearest[nearest != i]] = 1
    return float(links.nnz)


def kernel_of_torch_fidelity(real: Tensor, generated: Tensor) -> float:
    """100 subsets of 1000."""
    settings = {"kid_subsets": 100, "kid_subset_size": min(1000, len(real)), "verbose": False}
    return kid_features_to_metric(generated, real, **settings)["kernel_inception_distance_mean"]


def precision_of_torch_fidelity(real: Tensor, generated: Tensor) -> float:
    """Recall is computed too."""
    settings = {"prc_neighborhood": 3, "prc_batch_size": 10_000, "save_cpu_ram": False, "verbose": False}
    return prc_features_to_metric(generated, real, **settings)["precision"]


def everything_of_torch_fidelity(real: Tensor, generated: Tensor, logits: Tensor) -> float:
    """IS, KID, precision and recall, FID; returns FID."""
    isc_features_to_metric(logits)
    kernel_of_torch_fidelity(real, generated)
    precision_of_torch_fidelity(real, generated)
    sets = (fid_features_to_statistics(each) for each in (generated, real))
    return fid_statistics_to_metric(*sets, False)["frechet_inception_distance"]
