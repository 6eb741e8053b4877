"""What the metrics cost on features alone: time against the usual implementations, and memory.

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

import torch
from torch import Tensor

from diffadapt.common.atomic_files import write_atomically
from diffadapt.metrics import Statistics, fid, inception_score, kid, kid_subsets, precision_recall
from diffadapt.metrics.msid import neighbour_links

TEXT = Path(__file__).with_name("metrics_cost_page.md")


@dataclass(frozen=True)
class Pair:
    """Two ways to one number."""

    metric: str
    against: str
    ours: Callable[[], float]
    other: Callable[[], float]
    goal: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes the page. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="docs/evaluation_cost.md", help="the page to write")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side is timed")
    parser.add_argument("--images", type=int, default=5000, help="images of each set")
    parser.add_argument(
        "--many", type=int, default=20_000, help="images of each set where memory is measured"
    )
    parser.add_argument(
        "--memory", action="store_true", help="only that: print seconds and peak memory in GB"
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.memory:
        precision_recall(real=_features(options.many, 0), generated=_features(options.many, 1))
        print(time.process_time(), _peak_memory())
        return 0
    rows = [_row(pair, options.rounds) for pair in _pairs(options.images)]
    command = [sys.executable, __file__, "--memory", "--many", str(options.many)]
    measured = subprocess.run(
        command, check=True, capture_output=True, text=True, encoding="utf-8"
    ).stdout.split()
    kept = _seconds_with_a_kept_reference(options.images)
    page = _page(options, rows, kept=kept, seconds=float(measured[-2]), memory=float(measured[-1]))
    write_atomically(options.output, lambda path: path.write_text(page, encoding="utf-8"))
    print(page)
    return 0


def _page(options: argparse.Namespace, rows: Sequence[str], **measured: float) -> str:
    facts = {"images": options.images, "many": options.many, "rounds": options.rounds, **measured}
    return TEXT.read_text(encoding="utf-8").format(
        rows="\n".join(rows), matrix=4 * options.many**2 / 1e9, **facts
    )


def _pairs(n: int) -> list[Pair]:
    import metrics_cost_rivals as rivals  # not where memory is measured

    real, generated, logits = _features(n, 0), 1.02 * _features(n, 1), 2 * _features(n, 2, width=1008)
    sets = {"real": real, "generated": generated}
    known, scored = Statistics.of(real), Statistics.of(generated)
    doubled, fidelity = real.double(), "torch-fidelity"
    kernel = partial(rivals.kernel_of_torch_fidelity, **sets)
    manifold = partial(rivals.precision_of_torch_fidelity, **sets)
    everything = partial(rivals.everything_of_torch_fidelity, **sets, logits=logits)
    root = partial(rivals.frechet_by_matrix_root, known, scored)
    by_row = partial(rivals.links_row_by_row, doubled.numpy())
    return [
        Pair("FID", "scipy's sqrtm", lambda: _fresh(known, scored), root, "6"),
        Pair("MSID's graph", "row by row", lambda: float(len(neighbour_links(doubled, 5)[0])), by_row, "8"),
        Pair("KID", fidelity, lambda: kid(**sets), kernel),
        Pair("KID, 100 subsets", fidelity, lambda: kid_subsets(**sets), kernel),
        Pair("precision, recall", fidelity, lambda: precision_recall(**sets)[0], manifold),
        Pair("IS, FID, KID, precision, recall", fidelity, lambda: _everything(sets, logits), everything, "1"),
    ]


def _everything(sets: dict[str, Tensor], logits: Tensor) -> float:
    inception_score(logits=logits)
    kid(**sets)
    precision_recall(**sets)
    return fid(**sets)


def _features(n: int, seed: int, width: int = 2048) -> Tensor:
    """Of a spectrum that falls as that of images does, float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator).mul_(torch.exp(-torch.arange(width) / 300))


def _fresh(real: Statistics, generated: Statistics) -> float:
    """With nothing kept from an earlier call."""
    real = Statistics(real.mean, real.covariance, real.n)
    return fid(real=real, generated=Statistics(generated.mean, generated.covariance, generated.n))


def _seconds_with_a_kept_reference(n: int) -> float:
    real, generated = Statistics.of(_features(n, 0)), Statistics.of(_features(n, 1))
    fid(real=real, generated=generated)
    start = time.process_time()
    fid(real=real, generated=generated)
    return time.process_time() - start


def _row(pair: Pair, rounds: int) -> str:
    times: dict[str, list[float]] = {"ours": [], "other": []}
    values = {}
    for _ in range(rounds):
        for side, found in times.items():
            start = time.process_time()
            values[side] = getattr(pair, side)()
            found.append(time.process_time() - start)
        print(pair.metric, {side: round(found[-1], 2) for side, found in times.items()}, file=sys.stderr)
    ours, other = (statistics.median(found) for found in times.values())
    ratio = statistics.median(b / max(a, 1e-9) for a, b in zip(*times.values(), strict=True))
    goal, both = pair.goal and f">= {pair.goal}", f"{values['ours']:.6g}, {values['other']:.6g}"
    return f"| {pair.metric} | {pair.against} | {ours:.2f} | {other:.2f} | {ratio:.1f} | {goal} | {both} |"


def _peak_memory() -> float:
    """Of this process, GB (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e9


if __name__ == "__main__":
    sys.exit(main())
