"""Measures the metrics on features alone: time beside the usual implementations, and memory.

    python eval/benchmarks/metrics_cost.py --output docs/evaluation_cost.md

Needs scipy (the test extra). Each pair is timed in turns, in one process on one thread, in processor seconds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffadapt.common.atomic_files import write_utf8
from diffadapt.metrics import Statistics, fid, inception_score, kid, kid_subsets, precision_recall
from diffadapt.metrics.msid import neighbour_links

# scipy and torch-fidelity are imported by the functions that use them: the process whose memory is measured
# must not contain them.

TEXT = Path(__file__).with_name("metrics_cost_page.md")


@dataclass(frozen=True)
class Pair:
    """Two implementations of one metric.

    Attributes:
        metric: its name on the page.
        against: the name of the other implementation.
        ours: computes the metric.
        other: computes the same by the other implementation.
        goal: the least ratio of their times; "" for none.
    """

    metric: str
    against: str
    ours: Callable[[], float]
    other: Callable[[], float]
    goal: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes the page. Returns the exit code."""
    options = _parser().parse_args(argv)
    torch.set_num_threads(1)
    if options.memory:
        precision_recall(real=_features(options.many, 0), generated=_features(options.many, 1))
        print(time.process_time(), _peak_memory())
        return 0
    rows = [_row(pair, options.rounds) for pair in _pairs(options.images)]
    command = [sys.executable, __file__, "--memory", "--many", str(options.many)]
    result = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8")
    seconds, memory = (float(word) for word in result.stdout.split()[-2:])
    cached = _seconds_with_cached_reference(options.images)
    page = _page(options, rows, kept=cached, seconds=seconds, memory=memory)
    write_utf8(options.output, page)
    print(page)
    return 0


def _page(options: argparse.Namespace, rows: Sequence[str], **measured: float) -> str:
    return TEXT.read_text(encoding="utf-8").format(
        rows="\n".join(rows),
        matrix=4 * options.many**2 / 1e9,  # GB of all distances in float32
        images=options.images,
        many=options.many,
        rounds=options.rounds,
        **measured,
    )


def _pairs(n: int) -> list[Pair]:
    """The compared implementations, on sets of n images."""
    real = _features(n, 0)
    generated = 1.02 * _features(n, 1)
    logits = 2 * _features(n, 2, width=1008)
    sets = {"real": real, "generated": generated}
    real_statistics = Statistics.of(real)
    generated_statistics = Statistics.of(generated)
    double = real.double()
    fidelity = "torch-fidelity"
    return [
        Pair(
            "FID",
            "scipy's sqrtm",
            partial(_uncached_fid, real_statistics, generated_statistics),
            partial(frechet_by_matrix_root, real_statistics, generated_statistics),
            goal="6",
        ),
        Pair(
            "MSID's graph",
            "row by row",
            lambda: float(len(neighbour_links(double, 5)[0])),
            partial(links_row_by_row, double.numpy()),
            goal="8",
        ),
        Pair("KID", fidelity, partial(kid, **sets), partial(kernel_of_torch_fidelity, **sets)),
        Pair(
            "KID, 100 subsets",
            fidelity,
            partial(kid_subsets, **sets),
            partial(kernel_of_torch_fidelity, **sets),
        ),
        Pair(
            "precision, recall",
            fidelity,
            lambda: precision_recall(**sets)[0],
            partial(precision_of_torch_fidelity, **sets),
        ),
        Pair(
            "IS, FID, KID, precision, recall",
            fidelity,
            partial(_all_metrics, sets, logits),
            partial(all_metrics_of_torch_fidelity, **sets, logits=logits),
            goal="1",
        ),
    ]


def _all_metrics(sets: dict[str, Tensor], logits: Tensor) -> float:
    """IS, KID, precision and recall, FID. Returns FID."""
    inception_score(logits=logits)
    kid(**sets)
    precision_recall(**sets)
    return fid(**sets)


def _features(n: int, seed: int, width: int = 2048) -> Tensor:
    """Random features (n, width) float32, whose spectrum falls as that of images does."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator).mul_(torch.exp(-torch.arange(width) / 300))


def _uncached_fid(real: Statistics, generated: Statistics) -> float:
    """The distance of new objects, which have nothing cached from an earlier call."""
    real = Statistics(real.mean, real.covariance, real.n)
    return fid(real=real, generated=Statistics(generated.mean, generated.covariance, generated.n))


def _seconds_with_cached_reference(n: int) -> float:
    real = Statistics.of(_features(n, 0))
    generated = Statistics.of(_features(n, 1))
    fid(real=real, generated=generated)
    start = time.process_time()
    fid(real=real, generated=generated)
    return time.process_time() - start


def _row(pair: Pair, rounds: int) -> str:
    """Times a pair in turns. Returns its line of the table."""
    seconds: dict[str, list[float]] = {"ours": [], "other": []}
    values: dict[str, float] = {}
    for _ in range(rounds):
        for side in seconds:
            start = time.process_time()
            values[side] = getattr(pair, side)()
            seconds[side].append(time.process_time() - start)
        latest = {side: round(side_seconds[-1], 2) for side, side_seconds in seconds.items()}
        print(pair.metric, latest, file=sys.stderr)
    ratios = []
    for ours, other in zip(seconds["ours"], seconds["other"], strict=True):
        ratios.append(other / max(ours, 1e-9))
    cells = (
        pair.metric,
        pair.against,
        f"{statistics.median(seconds['ours']):.2f}",
        f"{statistics.median(seconds['other']):.2f}",
        f"{statistics.median(ratios):.1f}",
        f">= {pair.goal}" if pair.goal else "",
        f"{values['ours']:.6g}, {values['other']:.6g}",
    )
    return f"| {' | '.join(cells)} |"


def _peak_memory() -> float:
    """Peak resident memory of this process, GB (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e9
    raise OSError("/proc/self/status has no VmHWM")


# The usual implementations, on the same features


def frechet_by_matrix_root(real: Statistics, generated: Statistics) -> float:
    """The Frechet distance as pytorch-fid and clean-fid compute it.

    |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)),    the root by scipy's sqrtm
    """
    import scipy.linalg

    shift = float((real.mean - generated.mean).square().sum())
    root = scipy.linalg.sqrtm((generated.covariance @ real.covariance).numpy())
    return shift + float(real.covariance.trace() + generated.covariance.trace()) - 2 * np.trace(root).real


def links_row_by_row(features: np.ndarray, k: int = 5) -> float:
    """Number of neighbour links as MSID's authors find them, one row of distances at a time."""
    import scipy.sparse

    links = scipy.sparse.lil_matrix((len(features), len(features)))
    squares = (features * features).sum(axis=1)
    for row in range(len(features)):
        distances = squares - 2 * features[row].dot(features.T)  # up to a constant of the row
        nearest = np.argpartition(distances, k + 1)[: k + 1]
        links[row, nearest[nearest != row]] = 1
    return float(links.nnz)


def kernel_of_torch_fidelity(real: Tensor, generated: Tensor) -> float:
    """KID as the mean of 100 subsets of 1000."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    settings = {"kid_subsets": 100, "kid_subset_size": min(1000, len(real)), "verbose": False}
    return kid_features_to_metric(generated, real, **settings)["kernel_inception_distance_mean"]


def precision_of_torch_fidelity(real: Tensor, generated: Tensor) -> float:
    """Precision; recall is computed too."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    settings = {"prc_neighborhood": 3, "prc_batch_size": 10_000, "save_cpu_ram": False, "verbose": False}
    return prc_features_to_metric(generated, real, **settings)["precision"]


def all_metrics_of_torch_fidelity(real: Tensor, generated: Tensor, logits: Tensor) -> float:
    """IS, KID, precision and recall, FID. Returns FID."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric

    isc_features_to_metric(logits)
    kernel_of_torch_fidelity(real, generated)
    precision_of_torch_fidelity(real, generated)
    generated_statistics = fid_features_to_statistics(generated)
    real_statistics = fid_features_to_statistics(real)
    result = fid_statistics_to_metric(generated_statistics, real_statistics, False)
    return result["frechet_inception_distance"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--output", default="docs/evaluation_cost.md", help="page to write (default: docs/evaluation_cost.md)"
    )
    add("--rounds", type=int, default=3, help="how often each side is timed (default: 3)")
    add("--images", type=int, default=5000, help="images of each set (default: 5000)")
    add("--many", type=int, default=20_000, help="images of each set for the memory (default: 20000)")
    add("--memory", action="store_true", help="only print seconds and peak memory in GB of --many images")
    return parser


if __name__ == "__main__":
    sys.exit(main())
