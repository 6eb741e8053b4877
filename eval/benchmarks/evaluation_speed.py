"""How long an evaluation takes beside torch-fidelity: docs/evaluation_speed.md.

    python eval/benchmarks/evaluation_speed.py --images 512 --repeats 3 --output docs/evaluation_speed.md

The same images, networks, weights (random: time does not depend on them), batch size and threads, in turns in
one process. CPU time is that of the process and its children; on a busy machine it says more than the clock.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from evaluation_speed_rivals import BATCH, difference, fidelity, ours, prepare

PROGRAMS = {"torch-fidelity": fidelity, "diffadapt": ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512, help="in each of the two sets (default: 512)")
    parser.add_argument("--side", type=int, default=64, help="pixels of the images (default: 64)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; medians are shown (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument(
        "--manifolds", nargs="+", default=["inception", "vgg16"], help="networks of precision and recall"
    )
    parser.add_argument("--output", type=Path, help="where to write the page (default: print it)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        setup = prepare(Path(folder), arguments.images, arguments.side, arguments.manifolds)
        runs = {
            (program, manifold): lambda run=run, manifold=manifold: run(setup, manifold)
            for manifold in arguments.manifolds
            for program, run in PROGRAMS.items()
        }
        measured = measure(runs, arguments.repeats)
    text = page(measured, arguments)
    if arguments.output is None:
        print(text)
    else:
        arguments.output.write_text(text, encoding="utf-8")


def measure(
    runs: Mapping[tuple[str, str], Callable[[], dict[str, float]]], repeats: int
) -> dict[tuple[str, str], dict]:
    """Of each run its values, and clock and CPU seconds of every round; one after the other in each round."""
    found: dict[tuple[str, str], dict] = {key: {"clock": [], "cpu": []} for key in runs}
    for _ in range(repeats):
        for key, run in runs.items():
            before, start = cpu_seconds(), time.perf_counter()
            found[key]["values"] = run()
            found[key]["clock"].append(time.perf_counter() - start)
            found[key]["cpu"].append(cpu_seconds() - before)
            print(*key, found[key], file=sys.stderr, flush=True)
    return found


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


def page(measured: Mapping[tuple[str, str], Mapping], arguments: argparse.Namespace) -> str:
    """The Markdown page: times, ratios within rounds, and how far the values are apart."""
    lines = [
        "# Time of an evaluation\n",
        f"IS, FID, KID (100 subsets), precision and recall of {arguments.images} against {arguments.images} "
        f"PNG images of {arguments.side} pixels, random weights, batches of {BATCH}, "
        f"{arguments.threads} thread(s), {platform.machine()}, median of {arguments.repeats} rounds in "
        "turns. Ratios are taken within a round.\n",
        "| precision and recall on | program | clock, s | CPU, s | CPU, ratio | values, largest difference |",
        "|---|---|---|---|---|---|",
    ]
    for (program, manifold), row in measured.items():
        rival = measured["torch-fidelity", manifold]
        ratio = median(own / other for own, other in zip(row["cpu"], rival["cpu"], strict=True))
        apart = "" if row is rival else f"{difference(rival['values'], row['values']):.0e}"
        times = f"{median(row['clock']):.1f} | {median(row['cpu']):.1f} | {ratio:.2f}"
        lines.append(f"| {manifold} | {program} | {times} | {apart} |")
    lines += ["", *_across(measured)]
    lines.append(
        "Precision and recall on VGG16 are the published ones (arXiv 1904.06991); torch-fidelity then"
    )
    lines.append("reads every image twice. On Inception they are those of ADM's evaluator.\n")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torch-fidelity", "numpy"))
    options = f"--images {arguments.images} --side {arguments.side} --repeats {arguments.repeats}"
    options += f" --threads {arguments.threads} --manifolds {' '.join(arguments.manifolds)}"
    lines.append(f"Versions: {packages}. Made by:\n")
    lines.append(
        f"    python eval/benchmarks/evaluation_speed.py {options} --output docs/evaluation_speed.md\n"
    )
    return "\n".join(lines)


def _across(measured: Mapping[tuple[str, str], Mapping]) -> list[str]:
    """One pass of ours against torch-fidelity's default, which is two."""
    two, one = measured.get(("torch-fidelity", "vgg16")), measured.get(("diffadapt", "inception"))
    if two is None or one is None:
        return []
    ratio = median(own / other for own, other in zip(one["cpu"], two["cpu"], strict=True))
    return [
        f"All metrics on one network against torch-fidelity's default of two: {ratio:.2f} of its CPU time.\n"
    ]


if __name__ == "__main__":
    main()
