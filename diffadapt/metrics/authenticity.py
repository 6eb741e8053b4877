"""Share of generated images that are no near copies of training images (AuthPct, arXiv 2102.08921)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffadapt.metrics.checks import Features, as_pair
from diffadapt.metrics.intervals import Estimate, Interval, proportion_interval
from diffadapt.metrics.neighbours import Points, measure, nearest, prepare, squared_blocks

CANDIDATES = 8  # training images whose distance is measured again in float64


def authpct(*, training: Features, generated: Features) -> float:
    """Percentage of generated images that are authentic.

    With t the training image nearest to a generated image g, g is authentic when some other training image is
    nearer to t than g is: d(t, nearest other training image) < d(t, g).

    Args:
        training, generated: (N, D), (M, D) features of one layer.

    Raises:
        ValueError: a feature is NaN, the widths differ, or there are fewer than two images.

    Source: Alaa et al., arXiv 2102.08921, section 3.3, as dgm-eval computes it.
    """
    return 100 * float(is_authentic(training=training, generated=generated).double().mean())


def authpct_with_interval(*, training: Features, generated: Features) -> Estimate:
    """`authpct` and the exact interval of a proportion, given the training images."""
    hits = is_authentic(training=training, generated=generated)
    count = int(hits.sum())
    share = proportion_interval(count, len(hits), condition="the training images")
    return Estimate(100 * count / len(hits), Interval(100 * share.low, 100 * share.high, share.method))


def is_authentic(*, training: Features, generated: Features) -> Tensor:
    """Whether each generated image is authentic, (M,) bool."""
    training, generated = prepare(*as_pair(training, generated, dtype=None))
    distances_to_others, _ = nearest(training, 1)  # (N, 1)
    spacing = distances_to_others[:, 0]  # (N,) of each training image to its nearest other
    distances, indices = _nearest_of(generated, training)
    return spacing[indices] < distances


def _nearest_of(queries: Points, points: Points) -> tuple[Tensor, Tensor]:
    """Distance (M,), float64, and row number of the point nearest to each query."""
    count = min(CANDIDATES, len(points))
    distances = []
    indices = []
    for block in squared_blocks(queries, points):
        # float32 proposes candidates, float64 decides among them
        columns = block.squared.topk(count, dim=1, largest=False).indices  # (b, count)
        rows = torch.arange(block.rows.start, block.rows.stop, device=columns.device)
        exact = measure(queries, points, rows.repeat_interleave(count), columns.flatten()).view(-1, count)
        best = exact.argmin(dim=1, keepdim=True)
        distances.append(exact.gather(1, best)[:, 0])
        indices.append(columns.gather(1, best)[:, 0])
    return torch.cat(distances), torch.cat(indices)
