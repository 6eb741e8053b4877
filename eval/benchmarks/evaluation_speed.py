"""Measures the time of an evaluation beside torch-fidelity: docs/evaluation_speed.md.

    python eval/benchmarks/evaluation_speed.py --images 512 --repeats 3 --output docs/evaluation_speed.md

Same images, networks, weights (random: time does not depend on them), batch size and threads, in turns in one
process. CPU time is that of the process and its children; on a busy machine it says more than the clock.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch_fidelity
import torchvision
from PIL import Image

from diffadapt.evaluation.features.extraction import extract
from diffadapt.evaluation.features.extractors import Extractor
from diffadapt.evaluation.features.extractors.convolutional import Inception, inception, vgg16
from diffadapt.evaluation.scored_set import scored_set_from_images
from diffadapt.evaluation.scoring import Plan, score_set
from diffadapt.evaluation.sets.image_sets import open_set

BATCH = 32
INCEPTION_METRICS = ("inception_score", "fid", "kid_subsets")
SCORE_NAMES = {  # torch-fidelity's name -> ours
    "inception_score_mean": "inception_score",
    "frechet_inception_distance": "fid",
    "kernel_inception_distance_mean": "kid_subsets",
    "precision": "precision",
    "recall": "recall",
}

RunKey = tuple[str, str]  # program, network of precision and recall
Values = dict[str, float]  # score -> value


@dataclass(frozen=True)
class Setup:
    """The same input for both programs.

    Attributes:
        generated: folder of images.
        real: folder of images.
        files: network -> its weight file.
        extractors: network -> our extractor with the same weights.
        subset: size of KID's subsets.
    """

    generated: str
    real: str
    files: Mapping[str, Path]
    extractors: Mapping[str, Extractor]
    subset: int


def main() -> None:
    """Measures both programs and writes the page."""
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    runs: dict[RunKey, Callable[[], Values]] = {}
    with tempfile.TemporaryDirectory() as folder:
        setup = prepare(Path(folder), arguments.images, arguments.side, arguments.manifolds)
        for manifold in arguments.manifolds:
            runs["torch-fidelity", manifold] = partial(run_torch_fidelity, setup, manifold)
            runs["diffadapt", manifold] = partial(run_diffadapt, setup, manifold)
        measured = measure(runs, arguments.repeats)
    text = page(measured, arguments)
    if arguments.output is None:
        print(text)
    else:
        arguments.output.write_text(text, encoding="utf-8")


def prepare(folder: Path, count: int, side: int, manifolds: Sequence[str]) -> Setup:
    """Writes random smooth images and random weights, the same files for both programs.

    Args:
        folder: where they are written.
        count: images of each set.
        side: of the images, in pixels.
        manifolds: networks of precision and recall; Inception is always used.
    """
    for seed, name in enumerate(("generated", "real")):
        (folder / name).mkdir()
        generator = np.random.default_rng(seed)
        for number in range(count):
            coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            image = coarse.resize((side, side), Image.Resampling.BICUBIC)
            image.save(folder / name / f"{number:05d}.png")
    torch.manual_seed(0)
    networks = {"inception": Inception(None)}
    if "vgg16" in manifolds:
        networks["vgg16"] = torchvision.models.vgg16(weights=None)
    builders = {"inception": inception, "vgg16": vgg16}
    files: dict[str, Path] = {}
    extractors: dict[str, Extractor] = {}
    for name, network in networks.items():
        files[name] = folder / f"{name}.pth"
        torch.save(network.state_dict(), files[name])
        extractors[name] = builders[name](files[name], sha256="random", preset=None, device="cpu")
    subset = min(1000, count // 2)
    return Setup(str(folder / "generated"), str(folder / "real"), files, extractors, subset)


def run_torch_fidelity(setup: Setup, manifold: str) -> Values:
    """An evaluation by torch-fidelity: one call where one network serves all metrics, else its two passes.

    Args:
        setup: the input.
        manifold: the network of precision and recall, "inception" or "vgg16".
    """
    common = {
        "input1": setup.generated,
        "input2": setup.real,
        "cuda": False,
        "cache": False,
        "batch_size": BATCH,
        "kid_subset_size": setup.subset,
        "verbose": False,
    }
    on_inception = {
        "isc": True,
        "fid": True,
        "kid": True,
        **_network_options("inception-v3-compat", setup.files["inception"]),
    }
    if manifold == "inception":
        return torch_fidelity.calculate_metrics(**common, **on_inception, prc=True)
    values = torch_fidelity.calculate_metrics(**common, **on_inception)
    on_vgg = _network_options("vgg16", setup.files["vgg16"])
    return values | torch_fidelity.calculate_metrics(**common, **on_vgg, prc=True)


def run_diffadapt(setup: Setup, manifold: str) -> Values:
    """The same evaluation by diffadapt, which decodes every image once for all networks."""
    metrics_of = {"inception": INCEPTION_METRICS}
    metrics_of[manifold] = (*metrics_of.get(manifold, ()), "precision_recall")
    extractors = [setup.extractors[name] for name in metrics_of]
    scored_sets = []
    for folder, role in ((setup.generated, "generated"), (setup.real, "real")):
        image_set = open_set(folder)
        extracted = extract(image_set, extractors, batch_size=BATCH, title=role)
        scored_sets.append(scored_set_from_images(image_set, extracted, extractors, role=role))
    options = {"kid_subsets": {"size": setup.subset}}
    values: Values = {}
    for name, metrics in metrics_of.items():
        plan = Plan(metrics, options, allow_small=True, intervals=False, floor=False)
        result = score_set("generated", *scored_sets, setup.extractors[name], plan)
        for score in result.scores:
            values[str(score.identity["score"])] = score.value
    return values


def measure(runs: Mapping[RunKey, Callable[[], Values]], repeats: int) -> dict[RunKey, dict]:
    """Values, and clock and CPU seconds of every round, of each run; one after the other in each round."""
    measured: dict[RunKey, dict] = {key: {"clock": [], "cpu": []} for key in runs}
    for _ in range(repeats):
        for key, run in runs.items():
            cpu_start = cpu_seconds()
            start = time.perf_counter()
            measured[key]["values"] = run()
            measured[key]["clock"].append(time.perf_counter() - start)
            measured[key]["cpu"].append(cpu_seconds() - cpu_start)
            print(*key, measured[key], file=sys.stderr, flush=True)
    return measured


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def largest_difference(theirs: Mapping[str, float], ours: Mapping[str, float]) -> float:
    """The largest relative difference of the values that both programs give."""
    differences = []
    for their_name, our_name in SCORE_NAMES.items():
        reference = theirs[their_name]
        differences.append(abs(reference - ours[our_name]) / max(abs(reference), 1e-3))
    return max(differences)


def page(measured: Mapping[RunKey, Mapping], arguments: argparse.Namespace) -> str:
    """The page: times, ratios within rounds, and how far the values are apart."""
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
        difference = "" if row is rival else f"{largest_difference(rival['values'], row['values']):.0e}"
        times = f"{median(row['clock']):.1f} | {median(row['cpu']):.1f} | {_cpu_ratio(row, rival):.2f}"
        lines.append(f"| {manifold} | {program} | {times} | {difference} |")
    lines.append("")
    one_pass = measured.get(("diffadapt", "inception"))
    two_passes = measured.get(("torch-fidelity", "vgg16"))  # torch-fidelity's default
    if one_pass is not None and two_passes is not None:
        ratio = _cpu_ratio(one_pass, two_passes)
        comparison = "All metrics on one network against torch-fidelity's default of two"
        lines.append(f"{comparison}: {ratio:.2f} of its CPU time.\n")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torch-fidelity", "numpy"))
    options = (
        f"--images {arguments.images} --side {arguments.side} --repeats {arguments.repeats}"
        f" --threads {arguments.threads} --manifolds {' '.join(arguments.manifolds)}"
    )
    lines += [
        "Precision and recall on VGG16 are the published ones (arXiv 1904.06991); torch-fidelity then",
        "reads every image twice. On Inception they are those of ADM's evaluator.\n",
        f"Versions: {packages}. Made by:\n",
        f"    python eval/benchmarks/evaluation_speed.py {options} --output docs/evaluation_speed.md\n",
    ]
    return "\n".join(lines)


def _cpu_ratio(row: Mapping, rival: Mapping) -> float:
    return median(ours / theirs for ours, theirs in zip(row["cpu"], rival["cpu"], strict=True))


def _network_options(name: str, weights: Path) -> dict[str, object]:
    return {"feature_extractor": name, "feature_extractor_weights_path": str(weights)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--images", type=int, default=512, help="images of each of the two sets (default: 512)")
    add("--side", type=int, default=64, help="height and width of the images in pixels (default: 64)")
    add("--repeats", type=int, default=3, help="rounds; medians are shown (default: 3)")
    add("--threads", type=int, default=1, help="threads of torch (default: 1)")
    add(
        "--manifolds",
        nargs="+",
        default=["inception", "vgg16"],
        help="networks of precision and recall (default: inception vgg16)",
    )
    add("--output", type=Path, help="page to write (default: print it)")
    return parser


if __name__ == "__main__":
    main()
