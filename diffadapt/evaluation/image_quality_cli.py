"""Command-line options of `eval/image_quality.py`, and the objects they describe."""

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
SAMPLING_OPTIONS = ("prompt", "prompts_file", "class_labels", "base", "keep_images")  # idle without adapters


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds all options, in groups."""
    _add_set_options(parser.add_argument_group("images to score"))
    _add_metric_options(parser.add_argument_group("extractors and metrics"))
    _add_reading_options(parser.add_argument_group("reading images and storing features"))
    sampling_group = parser.add_argument_group("sampling, with --adapters, --run or --with_base")
    add_sampling_options(sampling_group, num_images=4)


def _add_set_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    several = {"nargs": "+", "default": []}
    add(
        "--generated",
        **several,
        metavar="SET",
        help="existing images: folders, zips, npz, datasets:NAME or embedded:NAME",
    )
    add(
        "--reference",
        metavar="SET",
        help="real images, or their saved features (.safetensors) or statistics (.npz)",
    )
    add(
        "--captions",
        metavar="FILE",
        help="captions of --generated: .jsonl, .csv, .parquet, COCO's .json, or sidecar",
    )
    add("--train", metavar="SET", help="training images of the generator, for authpct and fls")
    add("--adapters", **several, metavar="FILE[:STRENGTH]", help="generate and score images with adapters")
    add("--run", metavar="DIR", help="generate and score images with every checkpoint of a training run")
    add("--with_base", action="store_true", help="also without adapter, with the same prompts and seeds")
    add("--keep_images", metavar="DIR", help="folder for generated images (default: they are removed)")
    add(
        "--output",
        default="runs/image_quality/scores.json",
        help="JSON file; .md, .csv and .html are written beside it (default: runs/image_quality/scores.json)",
    )
    add("--verify", action="store_true", help="only check cases with a known outcome on this machine")


def _add_metric_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    several = {"nargs": "+", "default": []}
    add("--extractor", help=f"one or more, with commas: {', '.join(EXTRACTORS)} (default: inception)")
    add("--metrics", default="all", help=f"all (default), or some with commas: {', '.join(METRICS)}")
    add(
        "--metric_options",
        **several,
        metavar="METRIC.OPTION=VALUE",
        help="options of metrics, such as precision_recall.k=5",
    )
    add(
        "--protocol",
        choices=tuple(protocols.PROTOCOLS),
        help="use the extractor, resize, metrics and options of a paper",
    )
    add("--preference", metavar="MODULE:CLASS", help="preference model, such as HPSv2: a class of yours")
    add("--resize", help=f"{', '.join(PRESETS)} or crop-SIZE (default: by extractor)")
    add("--lpips_native", action="store_true", help=LPIPS_NATIVE)
    add(
        "--weights",
        **several,
        metavar="EXTRACTOR=PATH",
        help="weight files or folders, such as inception=/path/file.pth",
    )
    add(
        "--download",
        action="store_true",
        help="download missing weights after printing their size, source and hash",
    )
    add("--smoke", action="store_true", help="random weights, to try a command: NOT A SCORE")
    add("--no_intervals", action="store_true", help="skip confidence intervals, which take time")
    add("--metrics_seed", type=int, default=0, help="seed of subsets, probes and bootstraps (default: 0)")


def _add_reading_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--skip_bad", action="store_true", help="list and leave out unreadable images instead of stopping")
    add("--follow_links", action="store_true", help="follow links out of the sets' folders")
    add("--allow_small", action="store_true", help="score sets below a metric's minimum; marks the scores")
    add("--allow_overlap", action="store_true", help="score a set whose images are all in the reference too")
    add("--feature_batch_size", type=int, default=32, help="images per forward of an extractor (default: 32)")
    add("--cache_dir", help="for features of references (default: $DIFFADAPT_CACHE or ~/.cache/diffadapt)")
    add("--no_cache", action="store_true", help="neither read nor write cached features of references")
    add("--save_features", metavar="DIR", help="save the features of all sets, for references and compare.py")


def check_numbers(arguments: argparse.Namespace) -> None:
    """Checks the ranges of numbers.

    Raises:
        ValueError: a number is out of its range.
    """
    require_at_least(arguments, {**MINIMUM_VALUES, "metrics_seed": 0, "feature_batch_size": 1})
    require_seed(arguments.seed)
    require_seed(arguments.metrics_seed, "metrics_seed")


def fill_demo(arguments: argparse.Namespace) -> None:
    """Without any set to score, chooses two disjoint parts of the embedded style images.

    Raises:
        ValueError: there is a reference and nothing to score, or sampling options and nothing to sample.
    """
    if arguments.adapters or arguments.run or arguments.with_base:
        return
    idle_options = []
    for name in SAMPLING_OPTIONS:
        if getattr(arguments, name) is not None:
            idle_options.append(f"--{name}")
    if idle_options:
        raise ValueError(
            f"{', '.join(idle_options)}: no images are generated; give --adapters, --run or --with_base"
        )
    if arguments.generated:
        return
    if arguments.reference is not None:
        raise ValueError(
            "nothing to score; name images with --generated, or adapters with --adapters or --run"
        )
    arguments.generated = ["embedded:style/fluent3d/held_out"]
    arguments.reference = "embedded:style/fluent3d/train"
    arguments.allow_small = True  # 200 images, of which most metrics want more


def check_output_paths(arguments: argparse.Namespace) -> None:
    """Checks that everything that will be written can be, before any work.

    Raises:
        ValueError, OSError: a file or folder cannot be written; names it.
    """
    OutputFiles.of(arguments.output).check()
    for folder in (arguments.keep_images, arguments.save_features):
        if folder is not None:
            check_writable_folder(folder)


def load_extractors(arguments: argparse.Namespace, device: str) -> list[Extractor]:
    """The extractors of `--extractor`, else of the protocol, else the default for these sets.

    Raises:
        ValueError, FileNotFoundError: as `load_extractor`.
    """
    protocol = protocols.PROTOCOLS.get(arguments.protocol)
    preset = arguments.resize
    if arguments.extractor:
        names = arguments.extractor
    elif protocol is not None:
        names = protocol.extractor
        preset = preset or protocol.preset
    else:
        names = _default_extractor(arguments)
    weights = weights_by_extractor(arguments.weights)
    extractors = []
    for name in dict.fromkeys(names.split(",")):  # each once
        extractor = load_extractor(
            name,
            weights=weights,
            preset=lpips_preset(name, arguments.lpips_native, preset),
            device=device,
            download=arguments.download,
            smoke=arguments.smoke,
        )
        extractors.append(extractor)
    return extractors


def is_demo(arguments: argparse.Namespace) -> bool:
    """Whether everything scored is embedded."""
    names = list(arguments.generated)
    if arguments.reference:
        names.append(arguments.reference)
    if arguments.adapters or arguments.run or arguments.with_base:
        names.append(arguments.base)
    return all(is_embedded(str(name)) for name in names)


def plan_from(arguments: argparse.Namespace) -> Plan:
    """The metrics and their options; the command line takes precedence over the protocol.

    Raises:
        ValueError: a metric or an option is unknown.
    """
    protocol = protocols.PROTOCOLS.get(arguments.protocol)
    metrics = parse_metrics(arguments.metrics)
    options: dict[str, dict[str, object]] = {}
    if protocol is not None:
        metrics = metrics or protocol.metrics
        for key, values in protocol.options.items():
            options[key] = dict(values)
    for text in arguments.metric_options:
        key, name, value = _parse_metric_option(text)
        options.setdefault(key, {})[name] = value
    return Plan(
        metrics=metrics,
        options=options,
        seed=arguments.metrics_seed,
        allow_small=arguments.allow_small,
        intervals=not arguments.no_intervals,
    )


def read_options_from(arguments: argparse.Namespace) -> ReadOptions:
    """How images are read and features stored."""
    return ReadOptions(
        batch_size=arguments.feature_batch_size,
        skip_bad=arguments.skip_bad,
        cache=None if arguments.no_cache else Path(arguments.cache_dir or default_folder()),
        save_features=Path(arguments.save_features) if arguments.save_features else None,
        record_folder=Path(arguments.output).parent,
        allow_overlap=arguments.allow_overlap,
        download=arguments.download,
        follow_links=arguments.follow_links,
    )


def label_sets(sources: Sequence[str]) -> dict[str, str]:
    """Label -> set; the label is the last part of the set's name, with its folder or a number if needed."""
    by_label: dict[str, str] = {}
    for source in sources:
        parts = [part for part in Path(source.replace(":", "/")).parts if part not in ("/", "..", ".")]
        name = Path(parts[-1]).stem if parts else source
        # "a/samples" and "b/samples" become "samples" and "b-samples"
        if (name in by_label or name == REFERENCE) and len(parts) > 1:
            name = f"{parts[-2]}-{name}"
        label = name
        number = 2
        while label in by_label or label == REFERENCE:
            label = f"{name}-{number}"
            number += 1
        by_label[label] = source
    return by_label


def _parse_metric_option(text: str) -> tuple[str, str, object]:
    """METRIC.OPTION=VALUE as (metric, option, value)."""
    name, equals, value_text = text.partition("=")
    key, dot, option = name.partition(".")
    if not equals or not dot:
        raise ValueError(f"--metric_options takes METRIC.OPTION=VALUE, as precision_recall.k=5, got {text!r}")
    if key not in METRICS:
        raise ValueError(f"--metric_options {text}: unknown metric {key!r}{did_you_mean(key, METRICS)}")
    value = yaml.safe_load(value_text)
    check_options(key, {option: value}, METRICS[key].options)
    return key, option, value


def _default_extractor(arguments: argparse.Namespace) -> str:
    """Inception; for a demonstration the embedded extractor of its images, which needs no download."""
    if not is_demo(arguments):
        return "inception"
    names = [*arguments.generated, arguments.reference or "", arguments.base or ""]
    has_digits = any("digits" in name or "handwriting" in name for name in names)
    return "embedded:digits" if has_digits else "embedded:clip"
