"""`diffadapt sample`: images from adapter files, with everything that is needed to make them again."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import diffadapt as da
from diffadapt.data.grid import Panel, grid, to_pictures
from diffadapt.models import sd
from diffadapt.models.names import is_embedded
from diffadapt.sampling import Sampler, Shot, draw, shots
from diffadapt.training.session import DTYPES, use_cores


@dataclass(frozen=True)
class AdapterFile:
    """One adapter to load, and how strong."""

    path: str
    strength: float


def parse_adapter(text: str, *, strength: float) -> AdapterFile:
    """FILE or FILE:STRENGTH; a colon that is part of an existing path is left alone."""
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return AdapterFile(text, strength)
    try:
        return AdapterFile(head, float(tail))
    except ValueError:
        return AdapterFile(text, strength)


def sample(arguments: argparse.Namespace, *, command: str) -> Path:
    """Writes images, sheet.png and sample.json into the folder `arguments.out`, which it returns."""
    if arguments.num_images < 1:
        raise ValueError(f"--num_images must be at least 1, got {arguments.num_images}")
    files = [parse_adapter(text, strength=arguments.strength) for text in arguments.adapter]
    base = arguments.base or recorded_base(files)
    use_cores(arguments.num_threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = arguments.mixed_precision or ("fp16" if device == "cuda" else "no")
    sampler = _sampler(arguments, sd.DEFAULTS[sd.family_of(base)], DTYPES.get(precision))
    model = sd.load(base, device=device, safety_checker=True)
    for index, file in enumerate(files):
        da.load(model.pipe, file.path, strength=file.strength, name=f"adapter-{index}")
    wanted = [
        shot
        for prompt in arguments.prompt
        for shot in shots(prompt, arguments.num_images, seed=arguments.seed)
    ]
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    names = _write_images(model, wanted, sampler, folder)
    record = {
        "command": command,
        "demo": is_embedded(base),
        "base": base,
        "adapters": [
            {**dataclasses.asdict(file), "sha256": da.read_metadata(file.path)["sha256"]} for file in files
        ],
        "sampler": {**dataclasses.asdict(sampler), "autocast": precision},
        "images": [
            {"file": name, **dataclasses.asdict(shot)} for name, shot in zip(names, wanted, strict=True)
        ],
        "versions": {"torch": torch.__version__, "diffadapt": da.__version__},
    }
    (folder / "sample.json").write_text(json.dumps(record, indent=1) + "\n")
    return folder


def recorded_base(files: Sequence[AdapterFile]) -> str:
    """The base that all files name. Raises ValueError when one names none or they differ."""
    bases = {file.path: da.read_metadata(file.path)["adapter"]["base"]["name"] for file in files}
    named = set(bases.values())
    if named == {None} or None in named:
        raise ValueError("an adapter file does not name its base; give it with --base")
    if len(named) > 1:
        listed = ", ".join(f"{path}: {base}" for path, base in bases.items())
        raise ValueError(f"the adapters were trained on different bases ({listed}); choose one with --base")
    return named.pop()


def _sampler(
    arguments: argparse.Namespace, defaults: dict[str, object], autocast: torch.dtype | None
) -> Sampler:
    def choose(given: object, default: str) -> object:
        return defaults[default] if given is None else given

    return Sampler(
        num_inference_steps=choose(arguments.num_inference_steps, "num_inference_steps"),
        guidance_scale=choose(arguments.guidance_scale, "guidance_scale"),
        negative_prompt=arguments.negative_prompt,
        scheduler=arguments.scheduler,
        height=arguments.height,
        width=arguments.width,
        batch_size=choose(arguments.batch_size, "sample_batch_size"),
        autocast=autocast,
    )


def _write_images(
    model: sd.StableDiffusion, wanted: Sequence[Shot], sampler: Sampler, folder: Path
) -> list[str]:
    """Every image in its own file and all on one sheet. Returns the files' names."""
    pictures = []
    with tqdm(desc="images", total=len(wanted)) as bar:
        for images in draw(model.pipe, wanted, sampler):
            pictures += to_pictures(images)
            bar.update(len(images))
    names = [f"{index:03d}-seed{shot.seed}.png" for index, shot in enumerate(wanted)]
    for picture, name in zip(pictures, names, strict=True):
        picture.save(folder / name)
    captions = [f"seed {shot.seed}: {shot.prompt}" for shot in wanted]
    title = "DEMO · " if is_embedded(model.source) else ""
    title += wanted[0].prompt if len({shot.prompt for shot in wanted}) == 1 else "samples"
    note = f"{model.source}, {sampler.num_inference_steps} steps, guidance {sampler.guidance_scale:g}"
    grid([[Panel("", pictures, 4, captions)]], title=title, note=note).save(folder / "sheet.png")
    return names
