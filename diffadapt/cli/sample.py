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
from diffadapt.models.sampling import ImageRequest, SamplingConfig, generate
from diffadapt.models.sampling_columns import (
    AdapterFile,
    SamplingColumn,
    make_columns,
    parse_adapter_spec,
    parse_strengths,
)
from diffadapt.models.sampling_options import make_sampling_config, requested_images
from diffadapt.models.text_conditioned import truncated_prompts


def sample(arguments: argparse.Namespace, *, command: str) -> Path:
    """Writes images, sheet.png and sample.json into the folder `arguments.out`, which it returns."""
    if arguments.num_images < 1:
        raise ValueError(f"--num_images must be at least 1, got {arguments.num_images}")
    for name in ("num_inference_steps", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    require_seed(arguments.seed)
    files = [parse_adapter_spec(text) for text in arguments.adapter]
    strengths = parse_strengths(arguments.strength)
    looks = make_columns(files, strengths, side_by_side=arguments.grid_adapters, with_base=arguments.compare)
    wanted = requested_images(arguments, [file.path for file in files])
    base = arguments.base or base_named_in([file.path for file in files])
    set_cpu_threads(arguments.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = sampling_precision(arguments.mixed_precision, device)
    for notice in precision.notices:
        notify(notice)
    defaults = sampling_defaults(base, revision=arguments.revision)
    sampler = make_sampling_config(arguments, defaults, precision.dtype, [file.path for file in files])
    source = {name: getattr(arguments, name) for name in ("revision", "variant", "vae", "prediction_type")}
    pipe = open_frozen_pipeline(base, device=device, **source)
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


def _notify_cut_prompts(
    pipe: DiffusionPipeline, wanted: Sequence[ImageRequest], sampler: SamplingConfig
) -> None:
    prompts = [shot.prompt for shot in wanted if shot.label is None]
    if sampler.negative_prompt:
        prompts.append(sampler.negative_prompt)
    cuts = truncated_prompts(pipe, prompts)
    if cuts:
        notify(describe_truncated_captions(cuts))


def _facts(
    pipe: DiffusionPipeline, files: Sequence[AdapterFile], looks: Sequence[SamplingColumn]
) -> dict[str, object]:
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


def _sha256(path: str) -> str:
    return str(da.read_metadata(path)["sha256"])


def _write_images(
    pipe: DiffusionPipeline,
    adapters: Sequence[Adapter],
    looks: Sequence[SamplingColumn],
    wanted: Sequence[ImageRequest],
    sampler: SamplingConfig,
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
            for images in generate(pipe, wanted, sampler):
                pictures += to_pil_images(images)
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
    make_contact_sheet(rows, title=title, note=note).save(folder / "sheet.png")
    return records
