"""Scores of generated images: one pass over them, intervals, floors, and a page to look at.

    python eval/image_quality.py                                       # a demonstration on embedded images
    python eval/image_quality.py --generated out/a out/b --reference real --weights inception=/path/file.pth
    python eval/image_quality.py --adapters a.safetensors b.safetensors --prompts prompts.txt --reference real
    python eval/image_quality.py --run runs/dreambooth --prompts prompts.txt --reference real --extractor clip

Writes a JSON file, a Markdown table, a CSV with a row per image, and one self-contained HTML page.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState

from diffadapt.checkpoint import base_named_in
from diffadapt.evaluation import options
from diffadapt.evaluation.captions import with_captions
from diffadapt.evaluation.drawing import draw_sets, files_of_run
from diffadapt.evaluation.drawn_files import passing_folder
from diffadapt.evaluation.image_sets import ImageSet, has_prompts, open_set
from diffadapt.evaluation.page import write_page
from diffadapt.evaluation.preference import METRIC, load_preference
from diffadapt.evaluation.run import Outcome, begin, evaluate_sets
from diffadapt.evaluation.scoring import check_plan, with_layers
from diffadapt.evaluation.tables import markdown, per_image_csv
from diffadapt.exits import run
from diffadapt.files import write_atomically
from diffadapt.looks import parse_adapter
from diffadapt.metrics.analytic import analytic_cases


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    options.add_options(parser)
    arguments = parser.parse_args(argv)
    return run(lambda: verify() if arguments.verify else evaluate(arguments))


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
    """Draws what is to be drawn, scores everything, writes the four files. Returns the exit code."""
    device = begin(arguments.num_threads)
    options.fill_demo(arguments)
    files = [*arguments.adapters, *(files_of_run(arguments.run) if arguments.run else [])]
    is_drawing = bool(files) or arguments.with_base
    if files:
        arguments.base = arguments.base or base_named_in([parse_adapter(file).path for file in files])
    elif is_drawing and arguments.base is None:
        raise ValueError("--with_base without adapters needs --base, the model that draws")
    plan, reading = options.plan_of(arguments), options.reading_of(arguments)
    with PartialState().local_main_process_first():  # which fetches what is missing
        is_alone = arguments.preference is not None and plan.metrics == (METRIC,)
        extractors = [] if is_alone else options.extractors_of(arguments, str(device))
    extractors = [with_layers(extractor, plan) for extractor in extractors]
    preference = None
    if arguments.preference is not None:
        preference = load_preference(arguments.preference)
        plan = replace(plan, metrics=tuple(key for key in plan.metrics if key != METRIC))
    with_prompts = is_drawing or arguments.captions or any(map(has_prompts, arguments.generated))
    check_plan(
        plan,
        extractors,
        has_reference=arguments.reference is not None,
        has_prompts=bool(with_prompts),
        has_train=arguments.train is not None,
    )
    is_passing = is_drawing and arguments.keep_images is None
    with passing_folder() if is_passing else nullcontext(arguments.keep_images) as folder:
        sets: dict[str, str | ImageSet] = dict(
            draw_sets(arguments, files, Path(folder)) if is_drawing else {}
        )
        for label, source in options.labels_of(arguments.generated).items():
            images = captioned(source, arguments.captions, download=reading.download)
            sets[f"{label}-files" if label in sets else label] = images
        outcome = evaluate_sets(
            sets,
            arguments.reference,
            extractors,
            plan,
            reading=reading,
            protocol=arguments.protocol,
            train=arguments.train,
            preference=preference,
            settings={
                "command": shlex.join(["python", "eval/image_quality.py", *sys.argv[1:]]),
                "demo": options.is_demo(arguments),
            },
        )
        if outcome is not None:
            _write(outcome, Path(arguments.output))
    return 0


def captioned(source: str, captions: str | None, *, download: bool) -> str | ImageSet:
    """The images of a name with their captions, where some are given."""
    if captions is None or has_prompts(source):
        return source
    return with_captions(open_set(source, download=download), captions)


def _write(outcome: Outcome, path: Path) -> None:
    record = outcome.record
    table = markdown(record)
    write_page(record, path.with_suffix(".html"), outcome.picture)
    for suffix, text in ((".md", table), (".csv", per_image_csv(record))):
        write_atomically(
            path.with_suffix(suffix),
            lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"),
        )
    record.write(path)
    print(table)
    print(f"{path} with .md, .csv and .html beside it")


if __name__ == "__main__":
    sys.exit(main())
