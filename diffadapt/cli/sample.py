"""`diffadapt sample`: generate images with adapters, and record everything needed to generate them again."""

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
from diffadapt.adapters.adapter import Adapter
from diffadapt.common.contact_sheet import Panel, make_contact_sheet, to_pil_images
from diffadapt.common.messages import notify
from diffadapt.common.number_ranges import require_seed
from diffadapt.common.precision import sampling_precision
from diffadapt.common.runtime import set_cpu_threads
from diffadapt.data.summary import describe_truncated_captions
from diffadapt.formats.adapter_file import base_named_in
from diffadapt.models.base_names import is_embedded
from diffadapt.models.families import sampling_defaults
from diffadapt.models.open_pipeline import open_frozen_pipeline
from diffadapt.models.sampling import ImageRequest, SamplingConfig, generate, truncated_prompts
from diffadapt.models.sampling_columns import (
    AdapterFile,
    SamplingColumn,
    make_columns,
    parse_adapter_spec,
    parse_strengths,
)
from diffadapt.models.sampling_options import loading_options, make_sampling_config, requested_images


def sample(arguments: argparse.Namespace, *, command: str) -> Path:
    """Generates images with adapters.

    Args:
        arguments: the options of `diffadapt sample`.
        command: the command line, for the record.

    Returns:
        The output folder, with the images, sheet.png and sample.json.

    Raises:
        ValueError: an option has no possible value.
    """
    _check_options(arguments)
    files = []
    paths = []
    for text in arguments.adapter:
        file = parse_adapter_spec(text)
        files.append(file)
        paths.append(file.path)
    strengths = parse_strengths(arguments.strength)
    columns = make_columns(
        files, strengths, side_by_side=arguments.grid_adapters, with_base=arguments.compare
    )
    requests = requested_images(arguments, paths)
    base = arguments.base or base_named_in(paths)

    set_cpu_threads(arguments.num_threads)
    # a single process: `accelerate launch` is for training and evaluation
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = sampling_precision(arguments.mixed_precision, device)
    for notice in precision.notices:
        notify(notice)
    defaults = sampling_defaults(base, revision=arguments.revision)
    config = make_sampling_config(arguments, defaults, precision.dtype, paths)
    base_options = loading_options(arguments)
    pipe = open_frozen_pipeline(base, device=device, **base_options)
    _notify_truncated_prompts(pipe, requests, config)
    adapters = []  # all stay attached; a column sets their strengths
    for number, path in enumerate(paths):
        adapters.append(da.load(pipe, path, name=f"adapter-{number}"))

    # made only now: an error in an option or a file leaves no empty folder
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    images = _write_images(pipe, adapters, columns, requests, config, folder, base)
    record = {
        "command": command,
        "demo": is_embedded(base),
        "base": base,
        **base_options,
        "sampler": {**dataclasses.asdict(config), "autocast": precision.name},
        "device": device.type,
        **_describe_pipeline(pipe, files, columns),
        "images": images,
    }
    (folder / "sample.json").write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    return folder


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuses numbers out of range before anything is loaded."""
    if arguments.num_images < 1:
        raise ValueError(f"--num_images must be at least 1, got {arguments.num_images}")
    for name in ("num_inference_steps", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    require_seed(arguments.seed)


def _notify_truncated_prompts(
    pipe: DiffusionPipeline, requests: Sequence[ImageRequest], config: SamplingConfig
) -> None:
    """Reports prompts that are longer than the text encoders read."""
    prompts = [request.prompt for request in requests if request.label is None]  # a class is no text to read
    if config.negative_prompt:
        prompts.append(config.negative_prompt)
    truncated = truncated_prompts(pipe, prompts)
    if truncated:
        notify(describe_truncated_captions(truncated))


def _describe_pipeline(
    pipe: DiffusionPipeline, files: Sequence[AdapterFile], columns: Sequence[SamplingColumn]
) -> dict[str, object]:
    """The facts about pipeline, adapters and libraries that are needed to generate the images again."""
    adapters = []
    # strengths of the last column; "looks" below has those of all
    for file, strength in zip(files, columns[-1].strengths, strict=True):
        sha256 = str(da.read_metadata(file.path)["sha256"])
        adapters.append({"path": file.path, "strength": strength, "sha256": sha256})
    return {
        "pipeline": type(pipe).__name__,
        "scheduler": {"class": type(pipe.scheduler).__name__, **dict(pipe.scheduler.config)},
        "adapters": adapters,
        "looks": [dataclasses.asdict(column) for column in columns],  # the name in the file's format
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "diffadapt": da.__version__,
        },
    }


def _write_images(
    pipe: DiffusionPipeline,
    adapters: Sequence[Adapter],
    columns: Sequence[SamplingColumn],
    requests: Sequence[ImageRequest],
    config: SamplingConfig,
    folder: Path,
    base: str,
) -> list[dict]:
    """Writes every image to its own file, and all to one sheet with a panel for each column.

    Returns:
        A record of each image: its file, column, prompt, seed and label.
    """
    panels = []
    records = []
    captions = [f"seed {request.seed}: {request.prompt}" for request in requests]
    with tqdm(desc="images", total=len(requests) * len(columns)) as bar:
        for column in columns:
            # every column has the same prompts and seeds, so that only the strengths differ between panels
            for adapter, strength in zip(adapters, column.strengths, strict=True):
                adapter.strength = strength
            images = []
            for batch in generate(pipe, requests, config):
                images += to_pil_images(batch)
                bar.update(len(batch))
            for request, image in zip(requests, images, strict=True):
                name = f"{len(records):03d}-seed{request.seed}.png"
                image.save(folder / name)
                records.append({"file": name, "look": column.name, **dataclasses.asdict(request)})
            if len(columns) == 1:  # the title says it all
                panels.append(Panel("", images, 4, captions))
            else:
                panels.append(Panel(column.name, images, 2, captions))
    title = "DEMO · " if is_embedded(base) else ""
    distinct_prompts = {request.prompt for request in requests}
    title += requests[0].prompt if len(distinct_prompts) == 1 else "samples"
    note = f"{base}, {config.num_inference_steps} steps, guidance {config.guidance_scale:g}"
    rows = []
    for start in range(0, len(panels), 4):  # four panels side by side
        rows.append(panels[start : start + 4])
    make_contact_sheet(rows, title=title, note=note).save(folder / "sheet.png")
    return records
