"""Class pictures for prior preservation: what is there is used, what is missing is drawn by the base."""

from functools import partial
from io import BytesIO
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image

from diffadapt.data.examples import Example, folder_examples
from diffadapt.data.grid import to_pictures
from diffadapt.data.images import EXTENSIONS, UndrawnImage
from diffadapt.files import write_atomically
from diffadapt.sampling import Sampler, Shot, draw


def class_examples(
    pipe: DiffusionPipeline, folder: str | Path, *, prompt: str, count: int, sampler: Sampler, seed: int
) -> list[Example]:
    """The first `count` pictures of `folder`, filled up with pictures of `prompt` where it has fewer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = _missing(folder, count)
    files = (folder / f"{_name(number)}.png" for number in numbers)
    for images in draw(pipe, [Shot(prompt, seed + number) for number in numbers], sampler):
        for picture in to_pictures(images):
            write_atomically(next(files), partial(picture.save, format="png"))
    return folder_examples(folder, prompt)[:count]


def planned_class_examples(folder: str | Path, *, prompt: str, count: int, side: int) -> list[Example]:
    """`class_examples` without drawing and writing: grey squares of `side` pixels for what is missing."""
    folder, grey = Path(folder), BytesIO()
    missing = len(_missing(folder, count))
    present = folder_examples(folder, prompt)[:count] if missing < count else []
    Image.new("RGB", (side, side), "grey").save(grey, "png")
    undrawn = Example(UndrawnImage("a class picture that is not drawn yet", grey.getvalue()), prompt)
    return present + [undrawn] * missing


def _missing(folder: Path, count: int) -> list[int]:
    """The numbers of the pictures that would fill a folder up to `count`."""
    found = folder.iterdir() if folder.is_dir() else ()
    present = {path.stem for path in found if path.suffix.lower() in EXTENSIONS}
    numbers = [n for n in range(count + len(present)) if _name(n) not in present]
    return numbers[: max(0, count - len(present))]


def _name(number: int) -> str:
    return f"class-{number:05d}"
