"""Generated sets from adapter files: the same prompts and seeds for all, so that the sets are paired."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from diffusers import DiffusionPipeline
from tqdm import tqdm

import diffadapt as da
from diffadapt.common.precision import sampling_precision
from diffadapt.evaluation.generated_files import generate_files
from diffadapt.evaluation.sets.image_files import ImageFile
from diffadapt.evaluation.sets.image_sets import ImageSet
from diffadapt.formats.adapter_file import base_named_in
from diffadapt.models.families import sampling_defaults
from diffadapt.models.open_pipeline import open_frozen_pipeline
from diffadapt.models.sampling import ImageRequest, SamplingConfig
from diffadapt.models.sampling_columns import AdapterFile, parse_adapter_spec
from diffadapt.models.sampling_options import loading_options, make_sampling_config, requested_images

BASE = "base"  # label of the images without an adapter
RUN_FIELDS = ("method", "parameters", "steps", "seconds", "peak_memory_bytes")  # recorded from a run.json
CHECKPOINT_FIELDS = ("method", "parameters")  # those that hold for a checkpoint too


def files_of_run(folder: str) -> list[str]:
    """The adapter of every checkpoint of a training run in the order of steps, then the final one.

    Raises:
        FileNotFoundError: there is none.
    """
    paths = list(Path(folder).glob("checkpoint-*/adapter.safetensors"))
    paths.sort(key=lambda path: (len(path.parent.name), path))  # checkpoint-900 before checkpoint-1000
    final = Path(folder) / "adapter.safetensors"
    if final.is_file():
        paths.append(final)
    if not paths:
        raise FileNotFoundError(f"no adapter in {folder!r}; give the --output_dir of a training run")
    return [str(path) for path in paths]


def generate_sets(arguments: argparse.Namespace, files: Sequence[str], folder: Path) -> dict[str, ImageSet]:
    """Generates every adapter's images into folder/LABEL, each process its share.

    Args:
        arguments: the options of `add_sampling_options`, and `with_base`: generate with the bare base too.
        files: FILE or FILE:STRENGTH.
        folder: where the images are written.

    Returns:
        Label -> images.

    Raises:
        ValueError: the adapters are of different bases; or an error of loading or sampling.
    """
    adapters = [parse_adapter_spec(file, strength=1.0) for file in files]
    adapter_paths = [adapter.path for adapter in adapters]
    requests = requested_images(arguments, adapter_paths)
    base = arguments.base or base_named_in(adapter_paths)
    device = PartialState().device
    precision = sampling_precision(arguments.mixed_precision, device)
    for notice in precision.notices:
        PartialState().print(notice)
    base_options = loading_options(arguments)
    defaults = sampling_defaults(base, revision=arguments.revision)
    sampling = make_sampling_config(arguments, defaults, precision.dtype, adapter_paths)
    pipe = open_frozen_pipeline(base, device=device, **base_options)

    # for the record: what a reader needs to generate the images again
    generation: dict[str, object] = {
        "base": base,
        **base_options,
        "sampler": {**asdict(sampling), "autocast": precision.name},
        "seeds": [request.seed for request in requests],
    }
    labels = [request.label for request in requests]
    if None not in labels:  # a class-conditional base
        generation["labels"] = labels
    sets: dict[str, ImageSet] = {}
    if arguments.with_base:
        sets[BASE] = _generate_set(pipe, requests, sampling, folder / BASE, "base", base, generation)
    for label, file in label_adapters(adapters).items():
        adapter = da.load(pipe, file.path, strength=file.strength)
        adapter_generation = {**generation, **_adapter_facts(file)}
        sets[label] = _generate_set(
            pipe, requests, sampling, folder / label, "adapter", file.path, adapter_generation
        )
        da.detach(adapter)
    return sets


def label_adapters(adapters: Sequence[AdapterFile]) -> dict[str, AdapterFile]:
    """A short label for each adapter: the name of its file, or of its folder where files share a name."""
    names = [Path(adapter.path).stem for adapter in adapters]
    if len(set(names)) < len(names):  # checkpoint-100/adapter, checkpoint-200/adapter, ...
        names = [Path(adapter.path).resolve().parent.name for adapter in adapters]
    by_label: dict[str, AdapterFile] = {}
    for name, adapter in zip(names, adapters, strict=True):
        label = name
        number = 2
        while label in by_label or label == BASE:
            label = f"{name}-{number}"
            number += 1
        by_label[label] = adapter
    return by_label


def _generate_set(
    pipe: DiffusionPipeline,
    requests: Sequence[ImageRequest],
    sampling: SamplingConfig,
    folder: Path,
    kind: str,
    source: str,
    generation: Mapping[str, object],
) -> ImageSet:
    """Generates the images of one set.

    Args:
        pipe: the pipeline, with or without an adapter.
        requests: prompt and seed of each image.
        sampling: how they are sampled.
        folder: of the images.
        kind: adapter or base.
        source: the adapter file or the base.
        generation: how the images are generated, for the record.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    images = []
    prompts = []
    for index, request in enumerate(requests):
        name = f"{index:06d}-seed{request.seed}.png"
        paths.append(folder / name)
        images.append(ImageFile(name, folder / name))
        prompts.append(request.prompt)
    is_silent = not PartialState().is_main_process
    with tqdm(desc=folder.name, total=len(requests), unit="image", disable=is_silent) as bar:
        generate_files(pipe, requests, sampling, paths, bar)
    return ImageSet(source, kind, images, generation=generation, prompts=tuple(prompts))


def _adapter_facts(file: AdapterFile) -> dict[str, object]:
    """File, strength and hash of an adapter, and what its run.json says of it.

    The duration and the memory of a run are those of its final adapter, not of its checkpoints.
    """
    path = Path(file.path)
    facts = {"adapter": file.path, "strength": file.strength, "sha256": da.read_metadata(path)["sha256"]}
    folder = path.resolve().parent
    is_checkpoint = folder.name.startswith("checkpoint-")
    run_file = folder.parent / "run.json" if is_checkpoint else folder / "run.json"
    if run_file.is_file():
        run = json.loads(run_file.read_text(encoding="utf-8"))
        run_facts = {}
        for name in CHECKPOINT_FIELDS if is_checkpoint else RUN_FIELDS:
            if name in run:
                run_facts[name] = run[name]
        facts["run"] = run_facts
    return facts
