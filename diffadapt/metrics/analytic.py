"""Cases whose result is known on paper: run them on the machine that scores, before trusting its scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.metrics.frechet import fid
from diffadapt.metrics.inception_score import inception_score
from diffadapt.metrics.intervals import proportion_interval
from diffadapt.metrics.kernel import kid
from diffadapt.metrics.manifold import density_coverage, precision_recall
from diffadapt.metrics.msid import SCALE, TIMES, msid
from diffadapt.metrics.similarity import text_similarities
from diffadapt.metrics.vendi import vendi


@dataclass(frozen=True)
class AnalyticCase:
    """A metric on data for which its value is known.

    Attributes:
        name: what is computed, of what.
        expected: value by the formula.
        computed: value on this machine.
        tolerance: largest difference of the two that passes.
    """

    name: str
    expected: float
    computed: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return abs(self.computed - self.expected) <= self.tolerance


def analytic_cases() -> list[AnalyticCase]:
    """Computes all cases. None takes more than a second."""
    return [*_frechet_cases(), *_kernel_cases(), *_score_cases(), *_manifold_cases(), *_graph_cases()]


def points_with_moments(mean: Tensor, covariance: Tensor) -> Tensor:
    """Points (2 D, D) whose sample mean (D,) and covariance (D, D), with n - 1, are exactly these."""
    width = len(mean)
    # With L L^T the covariance and c^2 = (2 D - 1) / 2, the columns of c L and -c L have the mean 0 and the
    # covariance 2 c^2 L L^T / (2 D - 1) = L L^T.
    root = torch.linalg.cholesky(covariance) * ((2 * width - 1) / 2) ** 0.5
    return mean + torch.cat([root.T, -root.T])


def _frechet_cases() -> list[AnalyticCase]:
    zero = torch.zeros(2, dtype=torch.float64)
    shift = torch.tensor([3.0, 4.0], dtype=torch.float64)  # of length 5
    first = torch.tensor([[4.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    second = torch.tensor([[1.0, -0.5], [-0.5, 3.0]], dtype=torch.float64)
    real = points_with_moments(zero, first)
    generated = points_with_moments(shift, second)
    # Of a 2 x 2 matrix, (tr M^(1/2))^2 = tr M + 2 det(M)^(1/2), here of M = S_r S_g.
    product = first @ second
    root = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(torch.linalg.det(product))))
    expected = 25 + float(first.trace() + second.trace()) - 2 * root
    scaled = points_with_moments(zero, 4 * torch.eye(2, dtype=torch.float64))
    unit = points_with_moments(zero, torch.eye(2, dtype=torch.float64))
    few = torch.tensor([[0.0, 0, 0, 0], [2.0, 0, 0, 0]])  # fewer images than features
    few_shifted = few + torch.eye(4)[1] * 3
    return [
        AnalyticCase("Frechet distance of correlated Gaussians", expected, _fid(real, generated), 1e-9),
        AnalyticCase("Frechet distance of N(0, 4 I) and N(0, I)", 2.0, _fid(scaled, unit), 1e-9),
        AnalyticCase("Frechet distance of a set and itself", 0.0, _fid(real, real), 1e-9),
        AnalyticCase("Frechet distance of two images each", 9.0, _fid(few, few_shifted), 1e-9),
    ]


def _fid(real: Tensor, generated: Tensor) -> float:
    return fid(real=real, generated=generated)


def _kernel_cases() -> list[AnalyticCase]:
    distance = kid(real=torch.zeros(3, 1), generated=torch.ones(3, 1))
    # (x y + 1)^3: k(0, 0) = 1, k(1, 1) = 2^3, k(0, 1) = 1, so 1 + 8 - 2
    return [AnalyticCase("kernel distance of points at 0 and at 1", 7.0, distance, 1e-12)]


def _score_cases() -> list[AnalyticCase]:
    certain = 100 * torch.eye(5).repeat(4, 1)  # (20, 5) logits
    uncertain = torch.zeros(20, 5)
    right_angle = text_similarities(images=torch.eye(2), texts=torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    return [
        AnalyticCase("score of a sure classifier of 5 classes", 5.0, _one_split(certain), 1e-9),
        AnalyticCase("score of an undecided classifier", 1.0, _one_split(uncertain), 1e-9),
        AnalyticCase("Vendi score of 6 orthogonal images", 6.0, vendi(features=torch.eye(6)), 1e-9),
        AnalyticCase("Vendi score of one image 6 times", 1.0, vendi(features=torch.ones(6, 3)), 1e-6),
        AnalyticCase("cosines of 45 and 90 degrees", math.sqrt(0.125), float(right_angle.mean()), 1e-7),
        # P(X = 0) = (1 - p)^50 is 0.025 at the upper end
        AnalyticCase("upper bound of 0 in 50", 1 - 0.025 ** (1 / 50), proportion_interval(0, 50).high, 1e-9),
    ]


def _one_split(logits: Tensor) -> float:
    mean, _ = inception_score(logits=logits, splits=1)
    return mean


def _manifold_cases() -> list[AnalyticCase]:
    line = torch.arange(40.0)[:, None]
    collapsed = 20 + torch.arange(40.0)[:, None] * 1e-3  # every image within 0.04 of one real image
    generated_sets = {  # name -> generated images, expected precision and recall
        "of a set and itself": (line, 1.0, 1.0),
        "of a collapsed generator": (collapsed, 1.0, 1 / 40),
        "of sets far apart": (line + 1000, 0.0, 0.0),
    }
    cases = []
    for name, (generated, expected_precision, expected_recall) in generated_sets.items():
        precision, recall = precision_recall(real=line, generated=generated)
        cases.append(AnalyticCase(f"precision {name}", expected_precision, precision, 1e-12))
        cases.append(AnalyticCase(f"recall {name}", expected_recall, recall, 1e-12))
    # Balls of k = 4 have the radius 2 and are open: the image at 20 lies in those of 19 to 21, and the 39
    # images just above it in that of 22 too.
    density, coverage = density_coverage(real=line, generated=collapsed, k=4)
    expected_density = (39 * 4 + 3) / (40 * 4)
    cases.append(AnalyticCase("density of a collapsed generator", expected_density, density, 1e-12))
    cases.append(AnalyticCase("coverage of a collapsed generator", 4 / 40, coverage, 1e-12))
    return cases


def _graph_cases() -> list[AnalyticCase]:
    """A ring has the eigenvalues 1 - cos(2 pi j / n); a triangle 0, 3/2, 3/2."""
    n = 12
    angles = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    ring = torch.stack([angles.cos(), angles.sin()], dim=1)
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    triangles = torch.cat([corners + 100 * i for i in range(n // 3)])
    # tr exp(-t L) / n of both graphs, from their eigenvalues
    ring_trace = torch.exp(-TIMES[:, None] * (1 - angles.cos())).mean(dim=1)  # (256,)
    triangle_trace = (1 + 2 * torch.exp(-1.5 * TIMES)) / 3  # (256,)
    weights = torch.exp(-2 * (TIMES + 1 / TIMES))
    expected = float((weights * SCALE * (ring_trace - triangle_trace).abs()).max())
    distance = msid(real=ring, generated=triangles, k=2)
    return [AnalyticCase("heat traces of a ring and of triangles", expected, distance, 1e-6)]
