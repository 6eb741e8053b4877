"""Scores of generated images: one pass over them, intervals, floors, and a page to look at.

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
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState

from diffadapt.common.atomic_files import write_utf8
from diffadapt.common.exit_codes import run_command
from diffadapt.evaluation import image_quality_cli
from diffadapt.evaluation.evaluate_sets import (
    EvaluationOutput,
    check_counts,
    check_places,
    evaluate_sets,
    open_generated,
    open_reference,
    setup_evaluation,
)
from diffadapt.evaluation.features.extractors import Extractor
from diffadapt.evaluation.features.preference import METRIC, load_preference
from diffadapt.evaluation.generate import files_of_run, generate_sets
from diffadapt.evaluation.generated_files import temporary_folder
from diffadapt.evaluation.output_files import OutputFiles, report
from diffadapt.evaluation.report import tables
from diffadapt.evaluation.report.page import write_page
from diffadapt.evaluation.scoring import Plan, check_plan, with_layers
from diffadapt.evaluation.sets.captions import with_captions
from diffadapt.evaluation.sets.image_sets import ImageSet, has_prompts
from diffadapt.formats.adapter_file import base_named_in
from diffadapt.metrics.analytic import analytic_cases
from diffadapt.models.sampling_columns import parse_adapter_spec
from diffadapt.models.sampling_options import requested_images


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    image_quality_cli.add_options(parser)
    arguments = parser.parse_args(argv)
    return run_command(lambda: verify() if arguments.verify else evaluate(arguments))


def verify() -> int:
    """Runs the analytic cases on this machine. Returns the exit code: 1 when one fails."""
    cases = analytic_cases()
    for case in cases:
        mark = "ok  " if case.passed else "FAIL"
        print(f"{mark} {case.name}: expected {case.expected:.6g}, found {case.found:.6g}")
    failed = sum(not case.passed for case in cases)
    print(f"{len(cases) - failed} of {len(cases)} cases hold on this machine")
    return int(failed > 0)


def evaluate(arguments: argparse.Namespace) -> int:
    """Generates what is to be generated, scores everything, writes the four files. Returns the exit code."""
    image_quality_cli.check_numbers(arguments)
    device = setup_evaluation(arguments.num_threads)
    image_quality_cli.fill_demo(arguments)
    image_quality_cli.check_places(arguments)
    files = [*arguments.adapters, *(files_of_run(arguments.run) if arguments.run else [])]
    is_drawing = bool(files) or arguments.with_base
    if files:
        arguments.base = arguments.base or base_named_in([parse_adapter_spec(file).path for file in files])
    elif is_drawing and arguments.base is None:
        raise ValueError("--with_base without adapters needs --base, the model that draws")
    plan, read_options = (
        image_quality_cli.plan_from(arguments),
        image_quality_cli.read_options_from(arguments),
    )
    with PartialState().local_main_process_first():  # which fetches what is missing
        is_alone = arguments.preference is not None and plan.metrics == (METRIC,)
        extractors = [] if is_alone else image_quality_cli.extractors_of(arguments, str(device))
    extractors = [with_layers(extractor, plan) for extractor in extractors]
    preference = None
    if arguments.preference is not None:
        preference = load_preference(arguments.preference)
        plan = replace(plan, metrics=tuple(key for key in plan.metrics if key != METRIC))
    given: dict[str, ImageSet | Path] = {}
    for label, name in image_quality_cli.labels_of(arguments.generated).items():
        given[label] = captioned(open_generated(name, read_options), arguments)
    reference = None if arguments.reference is None else open_reference(arguments.reference, read_options)
    with_prompts = is_drawing or arguments.captions or any(map(has_prompts, arguments.generated))
    check_plan(
        plan,
        extractors,
        has_reference=reference is not None,
        has_prompts=bool(with_prompts),
        only_statistics=isinstance(reference, Path) and reference.suffix == ".npz",
        has_train=arguments.train is not None,
    )
    check_places(given, reference, read_options)
    check_counts(plan, extractors, given, reference)
    if is_drawing:
        check_drawing(arguments, files, plan, extractors, reference)
    is_passing = is_drawing and arguments.keep_images is None
    with temporary_folder() if is_passing else nullcontext(arguments.keep_images) as folder:
        sets: dict[str, ImageSet | Path] = {}
        if is_drawing:
            sets |= generate_sets(arguments, files, Path(folder))
        for label, source in given.items():
            sets[f"{label}-files" if label in sets else label] = source
        output = evaluate_sets(
            sets,
            reference,
            extractors,
            plan,
            read_options=read_options,
            protocol=arguments.protocol,
            train=arguments.train,
            preference=preference,
            settings={
                "command": shlex.join(["python", "eval/image_quality.py", *sys.argv[1:]]),
                "demo": image_quality_cli.is_demo(arguments),
            },
        )
        if output is None:
            return 0
        problems = write_outcome(output, OutputFiles.of(arguments.output))
    return report(problems)


def captioned(images: ImageSet | Path, arguments: argparse.Namespace) -> ImageSet | Path:
    """The images of a set with their captions, where some are given and it knows none."""
    if arguments.captions is None or isinstance(images, Path) or images.prompts:
        return images
    return with_captions(images, arguments.captions, follow_links=arguments.follow_links)


def check_drawing(
    arguments: argparse.Namespace,
    files: Sequence[str],
    plan: Plan,
    extractors: Sequence[Extractor],
    reference: ImageSet | Path | None,
) -> None:
    """Whether as many images as will be generated are enough. Raises: ValueError."""
    shots = requested_images(arguments, [parse_adapter_spec(file).path for file in files])
    expected = ImageSet("the images to be generated", "adapter", shots)
    check_counts(plan, extractors, {expected.source: expected}, reference)


def write_outcome(output: EvaluationOutput, places: OutputFiles) -> list[str]:
    """Writes the scores first, the page last. Returns what could not be computed or made."""
    record = output.record
    record.write(places.json)
    write_utf8(places.markdown, tables.report(record))
    write_utf8(places.csv, tables.per_image_csv(record))
    problems = [*output.failures, *write_page(record, places.page, output.load_image)]
    print(tables.markdown(record, width=tables.WIDTH))
    print(f"{places.json} with .md, .csv and .html beside it")
    return problems


if __name__ == "__main__":
    sys.exit(main())
