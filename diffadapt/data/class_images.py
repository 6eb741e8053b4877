"""Class pictures for prior preservation: what is there is used, what is missing is drawn by the base."""

from pathlib import Path

from diffusers import DiffusionPipeline

from diffadapt.data.examples import Example, folder_examples
from diffadapt.data.grid import to_pictures
from diffadapt.data.images import EXTENSIONS
from diffadapt.sampling import Sampler, Shot, draw


def class_examples(
    pipe: DiffusionPipeline, folder: str | Path, *, prompt: str, count: int, sampler: Sampler, seed: int
) -> list[Example]:
    """The first `count` pictures of `folder`, filled up with pictures of `prompt` where it has fewer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    present = {path.stem for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS}
    numbers = [n for n in range(count + len(present)) if _name(n) not in present]
    numbers = numbers[: max(0, count - len(present))]
    files = (folder / f"{_name(number)}.png" for number in numbers)
    for images in draw(pipe, [Shot(prompt, seed + number) for number in numbers], sampler):
        for picture in to_pictures(images):
            picture.save(next(files))
    return folder_examples(folder, prompt)[:count]


def _name(number: int) -> str:
    return f"class-{number:05d}"
