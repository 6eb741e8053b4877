"""How well adapters keep subjects: DreamBooth's protocol, over subjects, prompts and samples.

    python eval/subject.py                                    # the base on the embedded subjects
    python eval/subject.py --adapters cat=runs/cat/adapter.safetensors monkey=runs/monkey/adapter.safetensors
    python eval/subject.py --subjects dataset --prompts dataset/prompts_and_classes.txt \\
        --adapters dog=runs/dog/adapter.safetensors cat2=runs/cat2/adapter.safetensors --compare
    python eval/subject.py --subjects dataset --prompts prompts_and_classes.txt --images generated

DINO and CLIP-I compare with the real images (and those with each other: the ceiling), CLIP-T with the prompt
without the unique token, LPIPS the images of one prompt. Writes subject.json, .md, .csv, .html and images.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from accelerate import PartialState

from diffadapt.common.atomic_files import check_writable_folder
from diffadapt.common.exit_codes import run_command
from diffadapt.common.number_ranges import require_at_least, require_seed
from diffadapt.evaluation.evaluate_sets import setup_evaluation
from diffadapt.evaluation.features.extractors import (
    EMBEDDED,
    Extractor,
    available,
    load_extractor,
    weights_by_extractor,
)
from diffadapt.evaluation.features.extractors.convolutional import LPIPS_NATIVE, lpips_preset
from diffadapt.evaluation.output_files import OutputFiles, report_problems
from diffadapt.evaluation.report.tables import WIDTH, markdown
from diffadapt.evaluation.subject.evaluate_subjects import check_extractors, evaluate_subjects
from diffadapt.evaluation.subject.generate import SubjectSampling, SubjectSets, generate_subjects
from diffadapt.evaluation.subject.subjects import (
    Subject,
    embedded_subjects,
    existing_images,
    open_subjects,
    read_prompts,
)
from diffadapt.formats.adapter_file import base_named_in
from diffadapt.models.base_names import is_embedded
from diffadapt.models.sampling_options import training_resolution

DEMO_BASE = "embedded:emoji"
MINIMUM_VALUES = {  # option -> its smallest value
    "samples": 1,
    "num_inference_steps": 1,
    "guidance_scale": 0,
    "batch_size": 1,
    "seed": 0,
    "num_threads": 1,
}


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    require_at_least(arguments, MINIMUM_VALUES)
    require_seed(arguments.seed)
    device = setup_evaluation(arguments.num_threads)
    output_files = OutputFiles.of(Path(arguments.output) / "subject.json")
    check_writable_folder(arguments.output)
    output_files.check()
    files = adapter_files(arguments.adapters or ())
    subjects = chosen_subjects(arguments, list(files))
    with PartialState().local_main_process_first():  # which fetches what is missing
        extractors = chosen_extractors(arguments, str(device))
    check_extractors(extractors)
    sets = generated_sets(arguments, subjects, files)
    settings = {
        "command": shlex.join(["python", *sys.argv]),
        "protocol": "dreambooth",
        "demo": arguments.subjects is None,
        "unique_token": arguments.unique_token,
    }
    output = evaluate_subjects(
        sets,
        extractors,
        token=arguments.unique_token,
        seed=arguments.seed,
        settings=settings,
        skip_bad=arguments.skip_bad,
    )
    if output is None:  # the first process writes
        return 0
    problems = output.write(output_files)
    print(markdown(output.record, width=WIDTH))
    print(f"the images, best and worst: {output_files.page}")
    if not output.record.scores:
        problems.append("no score could be computed")
    return report_problems(problems)


def adapter_files(arguments: Sequence[str]) -> dict[str, str]:
    """Subject -> file of its adapter, from arguments SUBJECT=FILE.

    Raises:
        ValueError: an argument is of another form, or a subject has two.
    """
    files: dict[str, str] = {}
    for argument in arguments:
        subject, _, file = argument.partition("=")
        if not file or subject in files:
            raise ValueError(f"--adapters takes one SUBJECT=FILE for each subject, got {' '.join(arguments)}")
        files[subject] = file
    return files


def chosen_subjects(arguments: argparse.Namespace, names: list[str]) -> list[Subject]:
    """The subjects with these names (those with adapters); all of them without names."""
    if arguments.subjects is None:
        if arguments.prompts is not None:
            raise ValueError("--prompts belongs to --subjects FOLDER; give both or neither")
        return embedded_subjects(names)
    if arguments.prompts is None:
        raise ValueError("--subjects needs --prompts FILE, such as dreambooth's prompts_and_classes.txt")
    return open_subjects(
        arguments.subjects,
        read_prompts(arguments.prompts),
        names,
        follow_links=arguments.follow_links,
    )


def chosen_extractors(arguments: argparse.Namespace, device: str) -> list[Extractor]:
    """The extractors of `--extractors`.

    Default: embedded:clip for the embedded subjects, else DreamBooth's; LPIPS where its weights are at hand.
    """
    weights = weights_by_extractor(arguments.weights or ())
    names = arguments.extractors
    if names is None:
        names = [EMBEDDED[0]] if arguments.subjects is None else ["dino", "clip"]
        names += [name for name in available(weights) if name == "lpips:alex"]
    options = {"weights": weights, "device": device, "download": arguments.download}
    presets = {name: lpips_preset(name, arguments.lpips_native) for name in names}
    return [load_extractor(name, preset=preset, **options) for name, preset in presets.items()]


def generated_sets(
    arguments: argparse.Namespace, subjects: Sequence[Subject], files: dict[str, str]
) -> SubjectSets:
    """The images to score: those of `--images`, or generated ones."""
    if arguments.images is not None:
        if files or arguments.base or arguments.compare:
            raise ValueError("--images scores what is there: leave out --adapters, --base and --compare")
        images = existing_images(arguments.images, subjects, follow_links=arguments.follow_links)
        return {Path(arguments.images).name: (images, {})}
    base = arguments.base
    if not base and files:
        base = base_named_in(list(files.values()))
    if base is None and arguments.subjects is not None:
        raise ValueError(
            "name what generates the images: --base, --adapters SUBJECT=FILE ..., or --images FOLDER"
        )
    base = base or DEMO_BASE
    if is_embedded(base) != (arguments.subjects is None):
        raise ValueError(f"the base {base!r} and the subjects must both be embedded, or neither")
    options = {}
    for field in fields(SubjectSampling):
        if hasattr(arguments, field.name):
            options[field.name] = getattr(arguments, field.name)
    if options["samples"] is None:
        options["samples"] = 2 if is_embedded(base) else 4
    options["base"] = base
    options["side"] = training_resolution(list(files.values()))
    sampling = SubjectSampling(folder=Path(arguments.output) / "images", **options)
    return generate_subjects(sampling, subjects, files, with_base=arguments.compare or not files)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--subjects", help="folder with a folder of real images for each subject; default: the embedded ones")
    add("--prompts", help="dreambooth's prompts_and_classes.txt, or one of its format")
    add("--adapters", nargs="+", metavar="SUBJECT=FILE", help="an adapter for each subject to be scored")
    add("--images", help="folder of existing images, SUBJECT/NN-name.png with NN the prompt's number")
    add("--base", help="base that generates images; default: that of the adapters, else embedded:emoji")
    add("--compare", action="store_true", help="with --adapters: the bare base too, with the same seeds")
    add("--unique_token", default="sks", help="the word trained for the subject (default: sks)")
    add("--samples", type=int, help="images of each prompt (default: 4; 2 on the embedded subjects)")
    add("--extractors", nargs="+", help="default: dino clip, and lpips:alex where its weights are")
    add("--lpips_native", action="store_true", help=LPIPS_NATIVE)
    add("--weights", nargs="+", metavar="NAME=PATH", help="weights of extractors")
    add("--download", action="store_true", help="fetch weights that are missing")
    add("--num_inference_steps", type=int, help="denoising steps; default: what suits the base")
    add("--guidance_scale", type=float, help="classifier-free guidance; default: what suits the base")
    add("--batch_size", type=int, default=8, help="images generated at once; no effect on them (default: 8)")
    add(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        help="default: that of accelerate launch; else fp16 on a GPU, no on a CPU",
    )
    add("--seed", type=int, default=0, help="of the first image, and of the bootstrap (default: 0)")
    add("--num_threads", type=int, help="CPU threads; default: all available cores")
    add("--skip_bad", action="store_true", help="leave unreadable images out (listed) and go on")
    add("--follow_links", action="store_true", help="follow links out of the folders of images too")
    add("--output", default="runs/subject", help="folder (default: runs/subject)")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
