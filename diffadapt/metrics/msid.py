"""MSID: how differently heat flows on the neighbour graphs of two sets (IMD, arXiv 1905.11141).

The descriptor of a set is 1e6 / n tr exp(-t L) at 256 times t, L the normalised Laplacian of its
k-nearest-neighbour graph; the distance is max_t exp(-2 (t + 1/t)) |difference|. Constants are those of the
authors' code.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from diffadapt.metrics.checks import Features, as_pair
from diffadapt.metrics.intervals import Estimate, half_samples_interval

TIMES = torch.logspace(-1, 1, 256, dtype=torch.float64)
SCALE = 1e6
LANCZOS_STEPS = 10
PROBES = 100
EXACT_UP_TO = 4000  # images: beyond, eigenvalues cost more than they tell
PROBES_AT_ONCE = 25  # bounds the Krylov basis at n x steps x this many float64 numbers
ROWS = 512


def msid(
    *,
    real: Features,
    generated: Features,
    k: int = 5,
    seed: int = 0,
    trace: str = "auto",
    common_probes: bool = True,
) -> float:
    """Distance of the two sets' heat traces, lower is better.

    Args:
        k: neighbours of the graph.
        seed: of the random probes, where the trace is estimated.
        trace: "exact" (eigenvalues), "slq" (stochastic Lanczos quadrature), "auto": exact up to 4000 images.
        common_probes: the same probes for both sets when they are of one size, so that their noise cancels.
            False draws as the authors' code does after numpy.random.seed(seed), the real set first.
    Raises: ValueError for an unknown trace, NaN, or a set of no more than k + 1 images.
    """
    if trace not in ("auto", "exact", "slq"):
        raise ValueError(f"trace={trace!r}: expected auto, exact or slq")
    descriptors, generator = [], np.random.RandomState(seed)
    for features in as_pair(real, generated):
        n = len(features)
        if trace == "exact" or (trace == "auto" and n <= EXACT_UP_TO):
            traces = exact_heat_trace(laplacian(features, k))
        else:
            generator = np.random.RandomState(seed) if common_probes else generator
            probes = torch.from_numpy(generator.randn(n, PROBES))
            traces = estimated_heat_trace(laplacian(features, k), probes.to(features.device))
        descriptors.append(SCALE / n * traces)
    times = TIMES.to(descriptors[0].device)
    weights = torch.exp(-2 * (times + 1 / times))
    return float((weights * (descriptors[0] - descriptors[1]).abs()).max())


def msid_with_interval(
    *, real: Features, generated: Features, k: int = 5, seed: int = 0, repeats: int = 10
) -> Estimate:
    """`msid` and the spread over random halves of both sets.

    Its value for two equal distributions is not 0: the real-versus-real floor tells how large it is.
    """
    real, generated = as_pair(real, generated)
    value = msid(real=real, generated=generated, k=k, seed=seed)
    n = min(len(real), len(generated))

    def of_rows(rows: Tensor) -> float:
        return msid(real=real[rows], generated=generated[rows], k=k, seed=seed)

    return Estimate(value, half_samples_interval(value, of_rows, n, repeats=repeats, seed=seed, low=0.0))


def laplacian(features: Tensor, k: int) -> Tensor:
    """Normalised Laplacian I - D^(-1/2) A D^(-1/2), A the union of nearest-neighbour links, sparse (n, n)."""
    n = len(features)
    if not 1 <= k < n - 1:
        raise ValueError(f"a graph of {k} neighbours needs more than {k + 1} images, got {n}")
    rows, columns = neighbour_links(features, k)
    links = torch.unique(torch.cat([rows * n + columns, columns * n + rows]))
    rows, columns = links // n, links % n
    root = torch.bincount(rows, minlength=n).double().rsqrt()
    diagonal = torch.arange(n, device=features.device)
    indices = torch.stack([torch.cat([rows, diagonal]), torch.cat([columns, diagonal])])
    values = torch.cat([-root[rows] * root[columns], torch.ones_like(root)])
    return torch.sparse_coo_tensor(indices, values, (n, n), check_invariants=False).coalesce()


def neighbour_links(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(from, to) of each row's k nearest others: the k + 1 nearest rows without the row itself.

    Among more than k exact copies of a row it may be missing from its own nearest; it then has k + 1 links,
    as in the authors' code.
    """
    squares = features.square().sum(dim=1)
    found = []
    for start in range(0, len(features), ROWS):
        distances = torch.addmm(squares, features[start : start + ROWS], features.T, alpha=-2)
        nearest = distances.topk(k + 1, dim=1, largest=False, sorted=False).indices
        rows = torch.arange(start, start + len(nearest), device=features.device)[:, None].expand_as(nearest)
        found.append(torch.stack([rows[nearest != rows], nearest[nearest != rows]]))
    rows, columns = torch.cat(found, dim=1)
    return rows, columns


def exact_heat_trace(matrix: Tensor) -> Tensor:
    """tr exp(-t L) at every time, (256,)."""
    values = torch.linalg.eigvalsh(matrix.to_dense())
    return torch.exp(-TIMES.to(values.device)[:, None] * values).sum(dim=1)


def estimated_heat_trace(matrix: Tensor, probes: Tensor) -> Tensor:
    """tr exp(-t L) by stochastic Lanczos quadrature, with tr L = n as control variate, (256,).

    Args:
        probes: (n, count) random starting vectors.
    """
    n, times = len(probes), TIMES.to(probes.device)[:, None, None]
    quadratures = [lanczos(matrix, chunk) for chunk in probes.split(PROBES_AT_ONCE, dim=1)]
    nodes, weights = (torch.cat(parts) for parts in zip(*quadratures, strict=True))
    heat = n * (torch.exp(-times * nodes) * weights).sum(dim=2).mean(dim=1)
    drift = n * (-times * nodes * weights).sum(dim=2).mean(dim=1)
    return heat - torch.exp(-TIMES.to(probes.device)) * (drift + TIMES.to(probes.device) * n)


def lanczos(matrix: Tensor, probes: Tensor, steps: int = LANCZOS_STEPS) -> tuple[Tensor, Tensor]:
    """Gauss quadrature of the spectrum seen by each probe: nodes and weights, (count, steps) each.

    Lanczos with full re-orthogonalisation, all probes at once.
    """
    n, count = probes.shape
    steps = min(steps, n)
    basis = probes.new_zeros(steps, n, count)
    tridiagonal = probes.new_zeros(count, steps, steps)
    vector = probes / torch.linalg.vector_norm(probes, dim=0)
    for step in range(steps):
        basis[step] = vector
        vector = matrix @ vector
        tridiagonal[:, step, step] = (vector * basis[step]).sum(dim=0)
        if step == steps - 1:
            break
        for _ in range(2):  # twice is enough for full orthogonality
            overlaps = torch.einsum("snc,nc->sc", basis[: step + 1], vector)
            vector = vector - torch.einsum("snc,sc->nc", basis[: step + 1], overlaps)
        norm = torch.linalg.vector_norm(vector, dim=0)
        tridiagonal[:, step, step + 1] = tridiagonal[:, step + 1, step] = norm
        vector = vector / norm.clamp(min=torch.finfo(vector.dtype).tiny)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    return nodes, vectors[:, 0].square()
