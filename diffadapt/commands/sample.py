"""`diffadapt sample`: images from adapter files, with everything that is needed to make them again."""

import argparse
import dataclasses
import json
import platform
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from tqdm import tqdm

import diffadapt as da
from diffadapt.adapter import Adapter
from diffadapt.checkpoint import base_named_in, read_metadata
from diffadapt.commands.class_names import class_names_in, class_numbers
from diffadapt.data.description import describe_cuts
from diffadapt.data.grid import Panel, grid, to_pictures
from diffadapt.files import read_text, text_lines
from diffadapt.looks import AdapterFile, Look, looks_of, parse_adapter, parse_strengths
from diffadapt.models.any_pipeline import open_base
from diffadapt.models.families import drawing_defaults
from diffadapt.models.names import is_embedded
from diffadapt.models.text import cut_prompts
from diffadapt.notices import notify
from diffadapt.number_ranges import require_seed
from diffadapt.precision import sampling_precision
from diffadapt.sampling import Sampler, Shot, draw, shots
from diffadapt.training.session import use_cores

PIPELINE_STEP = 8  # pixels; pipelines take multiples of it


def sample(arguments: argparse.Namespace, *, command: str) -> Path:
    """Writes images, sheet.png and sample.json into the folder `arguments.out`, which it returns."""
    if arguments.num_images < 1:
        raise ValueError(f"--num_images must be at least 1, got {arguments.num_images}")
    for name in ("num_inference_steps", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    require_seed(arguments.seed)
    files = [parse_adapter(text) for text in arguments.adapter]
    strengths = parse_strengths(arguments.strength)
    looks = looks_of(files, strengths, side_by_side=arguments.grid_adapters, with_base=arguments.compare)
    wanted = wanted_shots(arguments, [file.path for file in files])
    base = arguments.base or base_named_in([file.path for file in files])
    use_cores(arguments.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = sampling_precision(arguments.mixed_precision, device)
    for notice in precision.notices:
        notify(notice)
    defaults = drawing_defaults(base, revision=arguments.revision)
    sampler = sampler_of(arguments, defaults, precision.dtype, [file.path for file in files])
    source = {name: getattr(arguments, name) for name in ("revision", "variant", "vae", "prediction_type")}
    pipe = open_base(base, device=device, **source)
    _notify_cut_prompts(pipe, wanted, sampler)
    adapters = [da.load(pipe, file.path, name=f"adapter-{i}") for i, file in enumerate(files)]
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    images = _write_images(pipe, adapters, looks, wanted, sampler, folder, base)
    record = {
        "command": command,
        "demo": is_embedded(base),
        "base": base,
        **source,
        "sampler": {**dataclasses.asdict(sampler), "autocast": precision.name},
        "device": device.type,
        **_facts(pipe, files, looks),
        "images": images,
    }
    (folder / "sample.json").write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    return folder


def _notify_cut_prompts(pipe: DiffusionPipeline, wanted: Sequence[Shot], sampler: Sampler) -> None:
    prompts = [shot.prompt for shot in wanted if shot.label is None]
    if sampler.negative_prompt:
        prompts.append(sampler.negative_prompt)
    cuts = cut_prompts(pipe, prompts)
    if cuts:
        notify(describe_cuts(cuts))


def _facts(pipe: DiffusionPipeline, files: Sequence[AdapterFile], looks: Sequence[Look]) -> dict[str, object]:
    """What one needs to know of pipeline, adapters and libraries to make the images again."""
    return {
        "pipeline": type(pipe).__name__,
        "scheduler": {"class": type(pipe.scheduler).__name__, **dict(pipe.scheduler.config)},
        "adapters": [
            {"path": file.path, "strength": looks[-1].strengths[i], "sha256": _sha256(file.path)}
            for i, file in enumerate(files)
        ],
        "looks": [dataclasses.asdict(look) for look in looks],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "diffadapt": da.__version__,
        },
    }


def wanted_shots(arguments: argparse.Namespace, files: Sequence[str]) -> list[Shot]:
    """The images of one look: prompts, those of a file, or classes, each with consecutive seeds.

    Args:
        files: adapter files, whose classes can be asked for by name.
    """
    prompts = list(arguments.prompt or [])
    if arguments.prompts_file:
        prompts += prompts_in(arguments.prompts_file)
    if arguments.class_labels is not None and prompts:
        raise ValueError("give prompts or --class_labels: a base is told either words or classes")
    if arguments.class_labels is not None:
        names = class_names_in(files)
        return [
            Shot(f"class {names.get(label, label)}", arguments.seed + i, label)
            for label in class_numbers(arguments.class_labels, names)
            for i in range(arguments.num_images)
        ]
    if not prompts:
        raise ValueError("nothing to draw; give --prompt, --prompts_file or --class_labels")
    return [shot for prompt in prompts for shot in shots(prompt, arguments.num_images, seed=arguments.seed)]


def prompts_in(path: str | Path) -> list[str]:
    r"""The prompts of a file, one on each line; "# ..." is a remark, "\# ..." a prompt that begins with #."""
    prompts = []
    for line in text_lines(read_text(path)):
        prompt = " ".join(line.split())
        if prompt and not prompt.startswith("#"):
            prompts.append(prompt.removeprefix("\\") if prompt.startswith("\\#") else prompt)
    return prompts


def _sha256(path: str) -> str:
    return str(da.read_metadata(path)["sha256"])


def sampler_of(
    arguments: argparse.Namespace,
    defaults: dict[str, object],
    autocast: torch.dtype | None,
    files: Sequence[str],
) -> Sampler:
    """How images are made: the options of drawing, with defaults for what was not given.

    Without a size, images are as large as those that the adapters of `files` were trained on.
    """
    height, width = arguments.height, arguments.width
    if height is None and width is None:
        height = width = training_resolution(files)

    def choose(given: object, default: str) -> object:
        return defaults[default] if given is None else given

    return Sampler(
        num_inference_steps=choose(arguments.num_inference_steps, "num_inference_steps"),
        guidance_scale=choose(arguments.guidance_scale, "guidance_scale"),
        negative_prompt=arguments.negative_prompt,
        scheduler=arguments.scheduler,
        height=height,
        width=width,
        batch_size=choose(arguments.batch_size, "sample_batch_size"),
        autocast=autocast,
    )


def training_resolution(files: Sequence[str]) -> int | None:
    """The side, in pixels, of what pipelines generate nearest to the training images of adapter files.

    None where a file does not say, or where they differ: then the base's own size is the better guess.
    """
    texts = {str(read_metadata(file).get("resolution", "")) for file in files}
    text = texts.pop() if len(texts) == 1 else ""
    if not text.isdecimal():
        return None
    return int(text) // PIPELINE_STEP * PIPELINE_STEP or None


def _write_images(
    pipe: DiffusionPipeline,
    adapters: Sequence[Adapter],
    looks: Sequence[Look],
    wanted: Sequence[Shot],
    sampler: Sampler,
    folder: Path,
    base: str,
) -> list[dict]:
    """Every image in its own file and all on one sheet, a panel for each look. Returns a record of each."""
    panels, records = [], []
    captions = [f"seed {shot.seed}: {shot.prompt}" for shot in wanted]
    with tqdm(desc="images", total=len(wanted) * len(looks)) as bar:
        for look in looks:
            for adapter, strength in zip(adapters, look.strengths, strict=True):
                adapter.strength = strength
            pictures = []
            for images in draw(pipe, wanted, sampler):
                pictures += to_pictures(images)
                bar.update(len(images))
            for shot, picture in zip(wanted, pictures, strict=True):
                name = f"{len(records):03d}-seed{shot.seed}.png"
                picture.save(folder / name)
                records.append({"file": name, "look": look.name, **dataclasses.asdict(shot)})
            heading = look.name if len(looks) > 1 else ""
            panels.append(Panel(heading, pictures, 4 if len(looks) == 1 else 2, captions))
    title = "DEMO · " if is_embedded(base) else ""
    title += wanted[0].prompt if len({shot.prompt for shot in wanted}) == 1 else "samples"
    note = f"{base}, {sampler.num_inference_steps} steps, guidance {sampler.guidance_scale:g}"
    rows = [panels[start : start + 4] for start in range(0, len(panels), 4)]
    grid(rows, title=title, note=note).save(folder / "sheet.png")
    return records
