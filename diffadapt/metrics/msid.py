"""MSID, multi-scale intrinsic distance: heat flow on the neighbour graphs of two sets (arXiv 1905.11141).

The descriptor of a set of n images is

    h(t) = 1e6 / n tr exp(-t L)

at 256 times t, L the normalised Laplacian of its k-nearest-neighbour graph; the distance is

    max_t exp(-2 (t + 1/t)) |h_real(t) - h_generated(t)|.

Constants are those of the authors' code.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from diffadapt.metrics.checks import Features, as_pair
from diffadapt.metrics.intervals import Estimate, half_samples_interval

TIMES = torch.logspace(-1, 1, 256, dtype=torch.float64)
SCALE = 1e6  # of the descriptors, for readable numbers
LANCZOS_STEPS = 10  # nodes of the quadrature, exact for polynomials of degree 19
PROBES = 100  # random vectors that a trace is estimated from
EXACT_UP_TO = 4000  # images; beyond, eigenvalues are too expensive
PROBES_AT_ONCE = 25  # bounds the Krylov basis at n x steps x this many float64 numbers
ROWS = 512  # rows of the matrix of distances held at a time


def msid(
    *,
    real: Features,
    generated: Features,
    k: int = 5,
    seed: int = 0,
    trace: str = "auto",
    common_probes: bool = True,
) -> float:
    """Distance of the two sets' heat traces; lower is better.

    Args:
        k: neighbours of the graph.
        seed: of the random probes, where the trace is estimated.
        trace: "exact" (eigenvalues), "slq" (stochastic Lanczos quadrature), "auto": exact up to 4000 images.
        common_probes: the same probes for both sets when they are of one size, so that their noise cancels.
            False draws them as the authors' code does after numpy.random.seed(seed), the real set first.

    Raises:
        ValueError: the trace is unknown, a feature is NaN, or a set has no more than k + 1 images.
    """
    if trace not in ("auto", "exact", "slq"):
        raise ValueError(f"trace={trace!r}: expected auto, exact or slq")
    generator = np.random.RandomState(seed)
    descriptors = []  # (256,) of each set
    for features in as_pair(real, generated):
        n = len(features)
        if trace == "exact" or (trace == "auto" and n <= EXACT_UP_TO):
            traces = exact_heat_trace(laplacian(features, k))
        else:
            if common_probes:  # start again, so that the second set gets the first one's numbers
                generator = np.random.RandomState(seed)
            probes = torch.from_numpy(generator.randn(n, PROBES))
            traces = estimated_heat_trace(laplacian(features, k), probes.to(features.device))
        descriptors.append(SCALE / n * traces)
    real_descriptor, generated_descriptor = descriptors
    times = TIMES.to(real_descriptor.device)
    weights = torch.exp(-2 * (times + 1 / times))  # (256,)
    return float((weights * (real_descriptor - generated_descriptor).abs()).max())


def msid_with_interval(
    *, real: Features, generated: Features, k: int = 5, seed: int = 0, repeats: int = 10
) -> Estimate:
    """`msid` and the spread over random halves of both sets.

    Its value for two equal distributions is not 0: the floor of real images shows how large it is.
    """
    real, generated = as_pair(real, generated)
    value = msid(real=real, generated=generated, k=k, seed=seed)
    n = min(len(real), len(generated))

    def of_rows(rows: Tensor) -> float:
        return msid(real=real[rows], generated=generated[rows], k=k, seed=seed)

    interval = half_samples_interval(value, of_rows, n, repeats=repeats, seed=seed, low=0.0)
    return Estimate(value, interval)


def laplacian(features: Tensor, k: int) -> Tensor:
    """Normalised Laplacian of the neighbour graph, sparse (n, n).

        L = I - D^(-1/2) A D^(-1/2)

    A has a 1 for every link in either direction, D its row sums on the diagonal.
    """
    n = len(features)
    if not 1 <= k < n - 1:
        raise ValueError(f"a graph of {k} neighbours needs more than {k + 1} images, got {n}")
    rows, columns = neighbour_links(features, k)
    # each link once in either direction, as the number row * n + column
    links = torch.unique(torch.cat([rows * n + columns, columns * n + rows]))
    rows = links // n
    columns = links % n
    root = torch.bincount(rows, minlength=n).double().rsqrt()  # (n,), D^(-1/2)
    diagonal = torch.arange(n, device=features.device)
    indices = torch.stack([torch.cat([rows, diagonal]), torch.cat([columns, diagonal])])
    values = torch.cat([-root[rows] * root[columns], torch.ones_like(root)])
    return torch.sparse_coo_tensor(indices, values, (n, n), check_invariants=False).coalesce()


def neighbour_links(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Links (from, to) of each row to its k nearest others: the k + 1 nearest rows without the row itself.

    Among more than k exact copies of a row it may be missing from its own nearest; it then has k + 1 links,
    as in the authors' code.
    """
    squares = features.square().sum(dim=1)
    links = []
    for start in range(0, len(features), ROWS):
        # |b|^2 - 2 a.b orders a row as |a - b|^2 does.
        distances = torch.addmm(squares, features[start : start + ROWS], features.T, alpha=-2)  # (b, n)
        nearest = distances.topk(k + 1, dim=1, largest=False, sorted=False).indices  # (b, k + 1)
        rows = torch.arange(start, start + len(nearest), device=features.device)[:, None].expand_as(nearest)
        is_other = nearest != rows
        links.append(torch.stack([rows[is_other], nearest[is_other]]))
    rows, columns = torch.cat(links, dim=1)
    return rows, columns


def exact_heat_trace(matrix: Tensor) -> Tensor:
    """tr exp(-t L) = sum_i exp(-t lambda_i) at every time, (256,)."""
    values = torch.linalg.eigvalsh(matrix.to_dense())
    return torch.exp(-TIMES.to(values.device)[:, None] * values).sum(dim=1)


def estimated_heat_trace(matrix: Tensor, probes: Tensor) -> Tensor:
    """tr exp(-t L) by stochastic Lanczos quadrature, (256,).

    The same quadrature estimates tr(-t L), which is known to be -t n: its error, times exp(-t), is subtracted
    (a control variate).

    Args:
        probes: (n, count) random starting vectors.
    """
    n = len(probes)
    nodes = []
    weights = []
    for some_probes in probes.split(PROBES_AT_ONCE, dim=1):
        some_nodes, some_weights = lanczos(matrix, some_probes)
        nodes.append(some_nodes)
        weights.append(some_weights)
    nodes = torch.cat(nodes)  # (count, steps)
    weights = torch.cat(weights)  # (count, steps)
    times = TIMES.to(probes.device)
    exponents = -times[:, None, None] * nodes  # (256, count, steps)
    heat = n * (torch.exp(exponents) * weights).sum(dim=2).mean(dim=1)
    drift = n * (exponents * weights).sum(dim=2).mean(dim=1)
    return heat - torch.exp(-times) * (drift + times * n)


def lanczos(matrix: Tensor, probes: Tensor, steps: int = LANCZOS_STEPS) -> tuple[Tensor, Tensor]:
    """Gauss quadrature of the spectrum that each probe weighs: nodes and weights, (count, steps) each.

    Lanczos with full re-orthogonalisation, all probes at once: the nodes are the eigenvalues of the
    tridiagonal matrix, the weights the squared first components of its eigenvectors.
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
        tridiagonal[:, step, step + 1] = norm
        tridiagonal[:, step + 1, step] = norm
        # a norm of 0 ends the Krylov space early: the rest of the matrix is 0 and has weight 0
        vector = vector / norm.clamp(min=torch.finfo(vector.dtype).tiny)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    return nodes, vectors[:, 0].square()
