"""Scores of generated images, with confidence intervals, floors and a page to look at.

    python eval/image_quality.py                                       # a demonstration on embedded images
    python eval/image_quality.py --generated out/a out/b --reference real --weights inception=/path/file.pth
    python eval/image_quality.py --adapters a.safetensors b.safetensors --prompts prompts.txt --reference real
    python eval/image_quality.py --run runs/dreambooth --prompts prompts.txt --reference real --extractor clip

Writes a JSON file, a Markdown table, a CSV with a row per image, and one self-contained HTML page. The exit
code is 1 when something that was asked for could not be computed, 2 when nothing was done.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import PartialState

from diffadapt.common.exit_codes import run_command
from diffadapt.evaluation import image_quality_cli
from diffadapt.evaluation.evaluate_sets import (
    ReadOptions,
    check_counts,
    check_not_own_reference,
    evaluate_sets,
    open_generated,
    open_reference,
    setup_evaluation,
)
from diffadapt.evaluation.features.extractors import Extractor
from diffadapt.evaluation.features.preference import METRIC, Preference, load_preference
from diffadapt.evaluation.generate import files_of_run, generate_sets
from diffadapt.evaluation.generated_files import temporary_folder
from diffadapt.evaluation.output_files import OutputFiles, report_problems
from diffadapt.evaluation.report import tables
from diffadapt.evaluation.scoring import Plan, check_plan, with_layers
from diffadapt.evaluation.sets.captions import with_captions
from diffadapt.evaluation.sets.image_sets import ImageSet, has_prompts
from diffadapt.formats.adapter_file import base_named_in
from diffadapt.metrics.analytic import analytic_cases
from diffadapt.models.sampling_columns import parse_adapter_spec
from diffadapt.models.sampling_options import requested_images

Source = ImageSet | Path  # images, or a file of their features or statistics


def main(argv: list[str] | None = None) -> int:
    """Runs the script. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    image_quality_cli.add_options(parser)
    arguments = parser.parse_args(argv)
    return run_command(lambda: verify() if arguments.verify else evaluate(arguments))


def verify() -> int:
    """Checks the cases with a known outcome on this machine. Returns the exit code: 1 when one fails."""
    cases = analytic_cases()
    num_failed = 0
    for case in cases:
        mark = "ok  " if case.passed else "FAIL"
        print(f"{mark} {case.name}: expected {case.expected:.6g}, found {case.computed:.6g}")
        num_failed += not case.passed
    print(f"{len(cases) - num_failed} of {len(cases)} cases hold on this machine")
    return int(num_failed > 0)


@dataclass(frozen=True)
class Inputs:
    """What an evaluation needs, opened and checked.

    Attributes:
        adapter_files: FILE or FILE:STRENGTH of adapters to generate images with.
        existing_sets: label -> images of `--generated`.
        reference: real images; None where there are none.
        extractors: networks with the layers that the metrics read.
        plan: metrics and their options, without `preference`.
        preference: the preference model; None where there is none.
        read_options: how images are read.
    """

    adapter_files: list[str]
    existing_sets: dict[str, Source]
    reference: Source | None
    extractors: list[Extractor]
    plan: Plan
    preference: Preference | None
    read_options: ReadOptions


def evaluate(arguments: argparse.Namespace) -> int:
    """Generates images where asked to, scores all sets, writes the four files. Returns the exit code."""
    image_quality_cli.check_numbers(arguments)
    device = setup_evaluation(arguments.num_threads)
    image_quality_cli.fill_demo(arguments)
    image_quality_cli.check_output_paths(arguments)
    inputs = open_and_check(arguments, str(device))
    generates = is_generating(arguments, inputs.adapter_files)
    with image_folder(arguments, generates=generates) as folder:
        sets: dict[str, Source] = {}
        if generates:
            sets |= generate_sets(arguments, inputs.adapter_files, Path(folder))
        for label, source in inputs.existing_sets.items():
            sets[f"{label}-files" if label in sets else label] = source
        output = evaluate_sets(
            sets,
            inputs.reference,
            inputs.extractors,
            inputs.plan,
            read_options=inputs.read_options,
            protocol=arguments.protocol,
            train=arguments.train,
            preference=inputs.preference,
            settings={
                "command": shlex.join(["python", "eval/image_quality.py", *sys.argv[1:]]),
                "demo": image_quality_cli.is_demo(arguments),
            },
        )
        if output is None:  # only the first process writes
            return 0
        output_files = OutputFiles.of(arguments.output)
        problems = output.write(output_files)  # the page shows images of the folder
    print(tables.markdown(output.record, width=tables.WIDTH))
    print(f"{output_files.json} with .md, .csv and .html beside it")
    return report_problems(problems)


def open_and_check(arguments: argparse.Namespace, device: str) -> Inputs:
    """Opens sets and networks, and checks all that can be checked before an image is generated or read.

    Raises:
        ValueError, OSError: something is missing or does not fit together.
    """
    adapter_files = list(arguments.adapters)
    if arguments.run:
        adapter_files += files_of_run(arguments.run)
    generates = is_generating(arguments, adapter_files)
    if generates:
        arguments.base = choose_base(arguments, adapter_files)
    plan = image_quality_cli.plan_from(arguments)
    read_options = image_quality_cli.read_options_from(arguments)
    extractors = load_extractors(arguments, plan, device)
    preference = None
    if arguments.preference is not None:
        preference = load_preference(arguments.preference)
        plan = replace(plan, metrics=tuple(key for key in plan.metrics if key != METRIC))
    existing_sets: dict[str, Source] = {}
    for label, name in image_quality_cli.label_sets(arguments.generated).items():
        existing_sets[label] = add_captions(open_generated(name, read_options), arguments)
    reference = None
    if arguments.reference is not None:
        reference = open_reference(arguments.reference, read_options)

    knows_prompts = generates or arguments.captions or any(map(has_prompts, arguments.generated))
    check_plan(
        plan,
        extractors,
        has_reference=reference is not None,
        has_prompts=bool(knows_prompts),
        only_statistics=isinstance(reference, Path) and reference.suffix == ".npz",
        has_train=arguments.train is not None,
    )
    check_not_own_reference(existing_sets, reference, read_options)
    check_counts(plan, extractors, existing_sets, reference)
    if generates:
        check_generated_count(arguments, adapter_files, plan, extractors, reference)
    return Inputs(adapter_files, existing_sets, reference, extractors, plan, preference, read_options)


def is_generating(arguments: argparse.Namespace, adapter_files: Sequence[str]) -> bool:
    """Whether images are generated: with adapters or with the bare base."""
    return bool(adapter_files) or arguments.with_base


def choose_base(arguments: argparse.Namespace, adapter_files: Sequence[str]) -> str:
    """The base of `--base`, else the one named in the adapters.

    Raises:
        ValueError: there is none.
    """
    if arguments.base is not None:
        return arguments.base
    if not adapter_files:
        raise ValueError("--with_base without adapters needs --base, the model that generates images")
    return base_named_in([parse_adapter_spec(file).path for file in adapter_files])


def load_extractors(arguments: argparse.Namespace, plan: Plan, device: str) -> list[Extractor]:
    """The extractors with the layers that the plan needs; none when only a preference model is used."""
    if arguments.preference is not None and plan.metrics == (METRIC,):
        return []
    with PartialState().local_main_process_first():  # the first process downloads what is missing
        extractors = image_quality_cli.load_extractors(arguments, device)
    return [with_layers(extractor, plan) for extractor in extractors]


def add_captions(source: Source, arguments: argparse.Namespace) -> Source:
    """The images with the captions of `--captions`, unless they have prompts already."""
    if arguments.captions is None or isinstance(source, Path) or source.prompts:
        return source
    return with_captions(source, arguments.captions, follow_links=arguments.follow_links)


def check_generated_count(
    arguments: argparse.Namespace,
    adapter_files: Sequence[str],
    plan: Plan,
    extractors: Sequence[Extractor],
    reference: Source | None,
) -> None:
    """Checks that enough images will be generated.

    Raises:
        ValueError: they are too few for the metrics.
    """
    paths = [parse_adapter_spec(file).path for file in adapter_files]
    planned_set = ImageSet("the images to be generated", "adapter", requested_images(arguments, paths))
    check_counts(plan, extractors, {planned_set.source: planned_set}, reference)


def image_folder(
    arguments: argparse.Namespace, *, generates: bool
) -> AbstractContextManager[Path | str | None]:
    """The folder of generated images: `--keep_images`, or one that is removed afterwards."""
    if generates and arguments.keep_images is None:
        return temporary_folder()
    return nullcontext(arguments.keep_images)


if __name__ == "__main__":
    sys.exit(main())
