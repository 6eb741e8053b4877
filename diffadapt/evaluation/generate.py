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
from diffadapt.models.sampling_options import make_sampling_config, requested_images

BASE = "base"  # label of the images without an adapter
RUN_FIGURES = ("method", "parameters", "steps", "seconds", "peak_memory_bytes")  # kept of a run.json


def files_of_run(folder: str) -> list[str]:
    """The adapter of every checkpoint of a training run in the order of steps, then the final one.

    Raises: FileNotFoundError when there is none.
    """
    checkpoints = sorted(
        Path(folder).glob("checkpoint-*/adapter.safetensors"), key=lambda path: (len(path.parent.name), path)
    )
    final = Path(folder) / "adapter.safetensors"
    found = [*checkpoints, *([final] if final.is_file() else [])]
    if not found:
        raise FileNotFoundError(f"no adapter in {folder!r}; give the --output_dir of a training run")
    return [str(path) for path in found]


def generate_sets(arguments: argparse.Namespace, files: Sequence[str], folder: Path) -> dict[str, ImageSet]:
    """Draws every adapter's images into folder/LABEL, each process its share.

    Args:
        arguments: the options of `add_sampling_options`, and `with_base`: draw the bare base too.
        files: FILE or FILE:STRENGTH.
    Raises: ValueError for adapters of different bases, and what loading and drawing raise.
    """
    adapters = [parse_adapter_spec(file, strength=1.0) for file in files]
    wanted = requested_images(arguments, [adapter.path for adapter in adapters])
    base = arguments.base or base_named_in([adapter.path for adapter in adapters])
    device = PartialState().device
    precision = sampling_precision(arguments.mixed_precision, device)
    for notice in precision.notices:
        PartialState().print(notice)
    source = {name: getattr(arguments, name) for name in ("revision", "variant", "vae", "prediction_type")}
    sampler = make_sampling_config(
        arguments,
        sampling_defaults(base, revision=arguments.revision),
        precision.dtype,
        [adapter.path for adapter in adapters],
    )
    pipe = open_frozen_pipeline(base, device=device, **source)
    labels = [shot.label for shot in wanted]
    made = {
        "base": base,
        **source,
        "sampler": {**asdict(sampler), "autocast": precision.name},
        "seeds": [shot.seed for shot in wanted],
        **({"labels": labels} if None not in labels else {}),
    }
    sets: dict[str, ImageSet] = {}
    if arguments.with_base:
        sets[BASE] = _set(pipe, wanted, sampler, folder / BASE, "base", base, made)
    for label, file in labelled(adapters).items():
        adapter = da.load(pipe, file.path, strength=file.strength)
        sets[label] = _set(
            pipe, wanted, sampler, folder / label, "adapter", file.path, {**made, **_origin(file)}
        )
        da.detach(adapter)
    return sets


def labelled(adapters: Sequence[AdapterFile]) -> dict[str, AdapterFile]:
    """A short name for each: of its file, of its folder where files are called alike, else with a number."""
    stems = [Path(file.path).stem for file in adapters]
    if len(set(stems)) < len(stems):
        stems = [Path(file.path).resolve().parent.name for file in adapters]
    found: dict[str, AdapterFile] = {}
    for stem, file in zip(stems, adapters, strict=True):
        name, number = stem, 2
        while name in found or name == BASE:
            name, number = f"{stem}-{number}", number + 1
        found[name] = file
    return found


def _set(
    pipe: DiffusionPipeline,
    wanted: Sequence[ImageRequest],
    sampler: SamplingConfig,
    folder: Path,
    kind: str,
    source: str,
    made: Mapping[str, object],
) -> ImageSet:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{index:06d}-seed{shot.seed}.png" for index, shot in enumerate(wanted)]
    is_silent = not PartialState().is_main_process
    with tqdm(desc=folder.name, total=len(wanted), unit="image", disable=is_silent) as bar:
        generate_files(pipe, wanted, sampler, [folder / name for name in names], bar)
    pictures = [ImageFile(name, folder / name) for name in names]
    return ImageSet(source, kind, pictures, generation=made, prompts=tuple(shot.prompt for shot in wanted))


def _origin(file: AdapterFile) -> dict[str, object]:
    """Which adapter, and what its run says of it: whole figures for the final file, else what still holds."""
    path = Path(file.path)
    found = {"adapter": file.path, "strength": file.strength, "sha256": da.read_metadata(path)["sha256"]}
    is_checkpoint = path.resolve().parent.name.startswith("checkpoint-")
    record = path.resolve().parent / ("../run.json" if is_checkpoint else "run.json")
    if not record.is_file():
        return found
    run = json.loads(record.read_text(encoding="utf-8"))
    kept = ("method", "parameters") if is_checkpoint else RUN_FIGURES
    return {**found, "run": {name: run[name] for name in kept if name in run}}
