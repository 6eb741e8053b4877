"""Metrics that cover each set with balls, whose radii are the distances to the k-th nearest neighbours.

Improved precision and recall and realism: Kynkaanniemi et al., arXiv 1904.06991, with its rule for ties `<=`.
Density and coverage: Naeem et al., arXiv 2002.09797, with its rule `<`. Memory grows with N k, not with N^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffadapt.metrics.checks import Features, as_features, as_pair
from diffadapt.metrics.intervals import Estimate, normal_interval, proportion_interval
from diffadapt.metrics.neighbours import Block, Points, measure, nearest, prepare, squared_blocks


def precision_recall(*, real: Features, generated: Features, k: int = 3) -> tuple[float, float]:
    """Share of generated images inside the real set's balls, and of real images inside the generated set's.

    Raises:
        ValueError: a feature is NaN, the widths differ, or a set has no more than k images.
    """
    precise, recalled = precision_recall_hits(real=real, generated=generated, k=k)
    return float(precise.double().mean()), float(recalled.double().mean())


def precision_recall_hits(
    *,
    real: Features,
    generated: Features,
    k: int = 3,
    real_neighbours: Tensor | None = None,
    generated_neighbours: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Whether each generated image, and each real one, lies inside a ball of the other set: (M,), (N,) bool.

    Args:
        real_neighbours, generated_neighbours: the result of `neighbour_distances` for k or more neighbours,
            if it has been computed.
    """
    real, generated = prepare(*as_pair(real, generated, dtype=None))
    real_radii = _radii(real, k, real_neighbours)  # (N,)
    generated_radii = _radii(generated, k, generated_neighbours)  # (M,)
    precise = []
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real_radii.device)
    for block in squared_blocks(generated, real):  # (b, N)
        in_real_balls = _inside(block, generated, real, real_radii)
        in_generated_balls = _inside(block, generated, real, generated_radii[block.rows, None])
        precise.append(in_real_balls.any(dim=1))
        recalled |= in_generated_balls.any(dim=0)
    return torch.cat(precise), recalled


def density_coverage(*, real: Features, generated: Features, k: int = 5) -> tuple[float, float]:
    """Mean number of real balls around a generated image over k, and share of real balls that hold one.

    Density may exceed 1.

    Raises:
        ValueError: as `precision_recall`.
    """
    balls, members = density_coverage_counts(real=real, generated=generated, k=k)
    return float(balls.double().mean()) / k, float((members > 0).double().mean())


def density_coverage_counts(
    *, real: Features, generated: Features, k: int = 5, real_neighbours: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """In how many real balls each generated image lies, (M,); how many of them each real ball holds, (N,)."""
    real, generated = prepare(*as_pair(real, generated, dtype=None))
    radii = _radii(real, k, real_neighbours)
    balls = []
    members = torch.zeros(len(real), dtype=torch.long, device=radii.device)
    for block in squared_blocks(generated, real):
        inside = _inside(block, generated, real, radii, strict=True)  # (b, N)
        balls.append(inside.sum(dim=1))
        members += inside.sum(dim=0)
    return torch.cat(balls), members


def neighbour_distances(features: Features, k: int) -> Tensor:
    """Distances (N, k) of each image to its k nearest others, float64, ascending: radii for smaller k too."""
    (points,) = prepare(as_features("features", features, dtype=None))
    distances, _ = nearest(points, k)
    return distances


def _radii(points: Points, k: int, known_distances: Tensor | None) -> Tensor:
    """Distance of each point to its k-th nearest other, (N,)."""
    if known_distances is not None:
        return known_distances[:, k - 1]
    distances, _ = nearest(points, k)
    return distances[:, -1]


def _inside(block: Block, queries: Points, centres: Points, radii: Tensor, strict: bool = False) -> Tensor:
    """Which pairs of the block lie within their radius, (b, N) bool.

    Args:
        radii: (N,) of the centres, or (b, 1) of the queries.
        strict: whether a pair at the radius itself lies outside.
    """
    margin = block.squared - radii.float().square()  # (b, N)
    inside = margin < 0
    # Pairs within the error bound are measured and decided again in float64.
    rows, columns = (margin.abs() <= block.bound).nonzero(as_tuple=True)
    distances = measure(queries, centres, rows + block.rows.start, columns)
    limits = radii.expand(inside.shape)[rows, columns]
    inside[rows, columns] = distances < limits if strict else distances <= limits
    return inside


def realism(*, real: Features, generated: Features, k: int = 3) -> Tensor:
    """Realism of each generated image, (M,).

        max_j r_j / |g - x_j|,    r_j the radius of real image x_j

    It is at least 1 inside the manifold, and infinite on a real image itself. The half of the real images
    with the larger radii is left out: their balls cover what no real image shows.

    Source: Kynkaanniemi et al., arXiv 1904.06991, equation 3.
    """
    real, generated = as_pair(real, generated, dtype=None)
    (real_points,) = prepare(real)
    radii = _radii(real_points, k, None)  # (N,)
    is_small = radii <= radii.median()  # equation 3 prunes the larger half
    radii = radii[is_small]
    real, generated = prepare(real[is_small], generated)
    largest_ratios = []
    for block in squared_blocks(generated, real):
        distances = block.squared.double().clamp(min=0).sqrt()
        # squared distances that rounding may have changed by more than 1e-4 of them are measured in float64
        rows, columns = (block.squared < 1e4 * block.bound).nonzero(as_tuple=True)
        distances[rows, columns] = measure(generated, real, rows + block.rows.start, columns)
        ratios = (radii / distances).masked_fill(distances == 0, torch.inf)  # 0 / 0 on a repeated real image
        largest_ratios.append(ratios.amax(dim=1))
    return torch.cat(largest_ratios)


def precision_recall_with_interval(*, real: Features, generated: Features, **options) -> dict[str, Estimate]:
    """Both proportions with exact intervals, each given the other set, whose balls are held fixed.

    `options` are those of `precision_recall_hits`.
    """
    precise, recalled = precision_recall_hits(real=real, generated=generated, **options)
    return {
        "precision": _proportion(precise, "the real set"),
        "recall": _proportion(recalled, "the generated set"),
    }


def density_coverage_with_interval(
    *, real: Features, generated: Features, k: int = 5, real_neighbours: Tensor | None = None
) -> dict[str, Estimate]:
    """Density with the errors of both sets, coverage as a proportion of real images.

    Density is the mean of x_ij = [generated image i lies in the ball of real image j] N / k over all pairs.
    To first order its variance is that of the means over j, divided by M, plus that of the means over i,
    divided by N: the generated and the real images might both have been others.
    """
    balls, members = density_coverage_counts(
        real=real, generated=generated, k=k, real_neighbours=real_neighbours
    )
    generated_means = balls.double() / k  # (M,), of x_ij over j
    real_means = members.double() * (len(members) / len(balls) / k)  # (N,), of x_ij over i
    variance = float(generated_means.var() / len(balls) + real_means.var() / len(members))
    value = float(generated_means.mean())
    method = "normal, standard errors over generated and over real images"
    return {
        "density": Estimate(value, normal_interval(value, variance**0.5, method, low=0.0)),
        "coverage": _proportion(members > 0, "the generated set"),
    }


def _proportion(hits: Tensor, condition: str) -> Estimate:
    """The share of hits, with an exact interval given that the set named by `condition` is fixed."""
    inside = int(hits.sum())
    return Estimate(inside / len(hits), proportion_interval(inside, len(hits), condition=condition))
