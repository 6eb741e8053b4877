"""Options of `eval/image_quality.py`, and what they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml

from diffadapt.common.atomic_files import check_writable_folder
from diffadapt.common.messages import did_you_mean
from diffadapt.common.number_ranges import require_at_least, require_seed
from diffadapt.evaluation import protocols
from diffadapt.evaluation.evaluate_sets import REFERENCE, ReadOptions
from diffadapt.evaluation.features.cache import default_folder
from diffadapt.evaluation.features.extractors import (
    NAMES,
    Extractor,
    load_extractor,
    weights_by_extractor,
)
from diffadapt.evaluation.features.extractors.convolutional import LPIPS_NATIVE, lpips_preset
from diffadapt.evaluation.output_files import OutputFiles
from diffadapt.evaluation.scoring import Plan, parse_metrics
from diffadapt.metrics.metric_options import check_options
from diffadapt.metrics.registry import METRICS
from diffadapt.metrics.resize import PRESETS
from diffadapt.models.base_names import is_embedded
from diffadapt.models.sampling_options import MINIMUM_VALUES, add_sampling_options

EXTRACTORS = (*NAMES, "clip:MODEL", "dino:MODEL", "dinov2:MODEL", "module:Class")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is scored, against what, with which networks, and what is written."""
    _add_sets(parser)
    _add_measures(parser)
    _add_reading(parser)
    add_sampling_options(parser, num_images=4)


def _add_sets(parser: argparse.ArgumentParser) -> None:
    add, several = parser.add_argument, {"nargs": "+", "default": []}
    add("--generated", **several, metavar="SET", help="folders, zips, npz, datasets:NAME, embedded:NAME")
    add("--reference", metavar="SET", help="real images, saved features (.safetensors), statistics (.npz)")
    add(
        "--captions",
        metavar="FILE",
        help="of the images: .jsonl, .csv, .parquet, COCO's .json, or sidecar",
    )
    add("--train", metavar="SET", help="images that were trained on, for authpct and fls")
    add("--adapters", **several, metavar="FILE[:STRENGTH]", help="draw and score images of adapters")
    add("--run", metavar="DIR", help="draw and score every checkpoint of a training run")
    add("--with_base", action="store_true", help="draw and score the bare base too, with the same seeds")
    add("--keep_images", metavar="DIR", help="keep drawn images there; without it they are removed")
    add("--output", default="runs/image_quality/scores.json", help="JSON; .md, .csv and .html beside it")
    add("--verify", action="store_true", help="only run the cases whose outcome is known on paper")


def _add_measures(parser: argparse.ArgumentParser) -> None:
    add, several = parser.add_argument, {"nargs": "+", "default": []}
    add("--extractor", help=f"{', '.join(EXTRACTORS)}; several with commas; default: inception")
    add("--metrics", default="all", help=f"with commas: {', '.join(METRICS)}; or all (default)")
    add("--metric_options", **several, metavar="METRIC.OPTION=VALUE", help="as precision_recall.k=5")
    add("--protocol", choices=tuple(protocols.PROTOCOLS), help="extractor, resize, metrics and k of papers")
    add("--preference", metavar="MODULE:CLASS", help="a number for each image and prompt, such as HPSv2's")
    add("--resize", help=f"{', '.join(PRESETS)} or crop-SIZE; default: the extractor's own")
    add("--lpips_native", action="store_true", help=LPIPS_NATIVE)
    add("--weights", **several, metavar="EXTRACTOR=PATH", help="weights, as inception=/path/file.pth")
    add("--download", action="store_true", help="fetch missing weights, after showing size, source and hash")
    add("--smoke", action="store_true", help="random weights, to try a command: NOT A SCORE")
    add("--no_intervals", action="store_true", help="values alone, faster")
    add("--metrics_seed", type=int, default=0, help="of subsets, probes and bootstraps (default: 0)")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--skip_bad", action="store_true", help="leave unreadable images out (listed) and go on")
    add("--follow_links", action="store_true", help="follow links out of the sets' folders too")
    add("--allow_small", action="store_true", help="score too few images too, stamped as not comparable")
    add("--allow_overlap", action="store_true", help="score a set all of whose images stand in the reference")
    add("--feature_batch_size", type=int, default=32, help="images per forward of an extractor (default: 32)")
    add("--cache_dir", help="of references' features (default: $DIFFADAPT_CACHE or ~/.cache/diffadapt)")
    add("--no_cache", action="store_true", help="neither read nor keep features of references")
    add("--save_features", metavar="DIR", help="keep all sets' features, as references and for comparisons")


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raises: ValueError for a number out of its range."""
    require_at_least(arguments, {**MINIMUM_VALUES, "metrics_seed": 0, "feature_batch_size": 1})
    require_seed(arguments.seed)
    require_seed(arguments.metrics_seed, "metrics_seed")


def fill_demo(arguments: argparse.Namespace) -> None:
    """Without any set to score: the embedded style pictures, two disjoint parts of them.

    Raises: ValueError for a reference alone, and for options of drawing where nothing draws.
    """
    if arguments.adapters or arguments.run or arguments.with_base:
        return
    of_drawing = ("prompt", "prompts_file", "class_labels", "base", "keep_images")
    idle = [f"--{name}" for name in of_drawing if getattr(arguments, name) is not None]
    if idle:
        raise ValueError(
            f"{', '.join(idle)}: nothing is drawn; name what draws with --adapters, --run or --with_base"
        )
    if arguments.generated:
        return
    if arguments.reference is not None:
        raise ValueError(
            "nothing to score; name images with --generated, or adapters with --adapters or --run"
        )
    arguments.generated = ["embedded:style/fluent3d/held_out"]
    arguments.reference = "embedded:style/fluent3d/train"
    arguments.allow_small = True


def check_places(arguments: argparse.Namespace) -> None:
    """Whether everything that will be written can be, before any work.

    Raises: ValueError or OSError naming the place.
    """
    OutputFiles.of(arguments.output).check()
    for folder in (arguments.keep_images, arguments.save_features):
        if folder is not None:
            check_writable_folder(folder)


def extractors_of(arguments: argparse.Namespace, device: str) -> list[Extractor]:
    """The extractors that were named, else the protocol's, else the default for these sets.

    Raises: what `load_extractor` raises.
    """
    chosen = protocols.PROTOCOLS.get(arguments.protocol)
    names = arguments.extractor or (chosen.extractor if chosen else _default_extractor(arguments))
    weights = weights_by_extractor(arguments.weights)
    preset = arguments.resize or (chosen.preset if chosen and not arguments.extractor else None)
    return [
        load_extractor(
            name,
            weights=weights,
            preset=lpips_preset(name, arguments.lpips_native, preset),
            device=device,
            download=arguments.download,
            smoke=arguments.smoke,
        )
        for name in dict.fromkeys(names.split(","))
    ]


def is_demo(arguments: argparse.Namespace) -> bool:
    """Whether everything scored is embedded."""
    sets = [*arguments.generated, *([arguments.reference] if arguments.reference else [])]
    bases = [arguments.base] if arguments.adapters or arguments.run or arguments.with_base else []
    return all(is_embedded(str(name)) for name in [*sets, *bases])


def plan_from(arguments: argparse.Namespace) -> Plan:
    """Raises: ValueError for unknown metrics and options."""
    chosen = protocols.PROTOCOLS.get(arguments.protocol)
    metrics = parse_metrics(arguments.metrics)
    options = {key: dict(values) for key, values in (chosen.options if chosen else {}).items()}
    for key, name, value in (_metric_option(text) for text in arguments.metric_options):
        options.setdefault(key, {})[name] = value
    return Plan(
        metrics or (chosen.metrics if chosen else ()),
        options,
        arguments.metrics_seed,
        arguments.allow_small,
        not arguments.no_intervals,
    )


def read_options_from(arguments: argparse.Namespace) -> ReadOptions:
    """How images are read."""
    return ReadOptions(
        arguments.feature_batch_size,
        arguments.skip_bad,
        None if arguments.no_cache else Path(arguments.cache_dir or default_folder()),
        Path(arguments.save_features) if arguments.save_features else None,
        Path(arguments.output).parent,
        arguments.allow_overlap,
        arguments.download,
        arguments.follow_links,
    )


def labels_of(sources: Sequence[str]) -> dict[str, str]:
    """A short name for each set: the last part of its name, with more of it or a number where needed."""
    found: dict[str, str] = {}
    for source in sources:
        parts = [part for part in Path(source.replace(":", "/")).parts if part not in ("/", "..", ".")]
        name = Path(parts[-1]).stem if parts else source
        if (name in found or name == REFERENCE) and len(parts) > 1:
            name = f"{parts[-2]}-{name}"
        label, number = name, 2
        while label in found or label == REFERENCE:
            label, number = f"{name}-{number}", number + 1
        found[label] = source
    return found


def _metric_option(text: str) -> tuple[str, str, object]:
    name, equals, value = text.partition("=")
    key, dot, option = name.partition(".")
    if not equals or not dot:
        raise ValueError(f"--metric_options takes METRIC.OPTION=VALUE, as precision_recall.k=5, got {text!r}")
    if key not in METRICS:
        raise ValueError(f"--metric_options {text}: unknown metric {key!r}{did_you_mean(key, METRICS)}")
    parsed = yaml.safe_load(value)
    check_options(key, {option: parsed}, METRICS[key].options)
    return key, option, parsed


def _default_extractor(arguments: argparse.Namespace) -> str:
    if not is_demo(arguments):
        return "inception"
    names = [*arguments.generated, arguments.reference or "", arguments.base or ""]
    is_digits = any("digits" in name or "handwriting" in name for name in names)
    return "embedded:digits" if is_digits else "embedded:clip"
