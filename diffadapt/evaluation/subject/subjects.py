"""Subjects and prompts of DreamBooth's protocol, in the format of github.com/google/dreambooth."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffadapt.common.atomic_files import read_text, text_lines
from diffadapt.common.images import list_images
from diffadapt.common.messages import did_you_mean
from diffadapt.evaluation.sets.image_files import ImageFile, LazyImage
from diffadapt.evaluation.sets.image_sets import ImageSet
from diffadapt.models.base_names import resolve
from diffadapt.models.prompts import EMOJI_CONTEXTS

LIVE_CLASSES = ("cat", "dog")  # subjects of these get the prompts for live subjects
EMBEDDED = {"cat": "cat face", "monkey": "monkey face"}  # shipped subject -> its class in the base's words
LARGEST = 1 << 20  # bytes of a prompts file
TEMPLATE = re.compile(
    r"""(['"])(?P<prompt>[^{}]{0,200}\{0\} \{1\}[^{}]{0,200})\1\.format\(unique_token, class_token\),?"""
)
CLASS = re.compile(r"(?P<subject>[\w .-]{1,100}),(?P<class>[\w .-]{1,100})")
SECTIONS = {"Classes": "classes", "Object Prompts": "objects", "Live Subject Prompts": "live"}
FURNITURE = ("Prompts", "prompt_list = [", "]", "subject_name,class")  # lines without content
NUMBER = re.compile(r"(\d{1,4})[-_/.]")  # of the prompt, where an image's name begins


@dataclass(frozen=True)
class Prompts:
    """A prompts file: subject -> class, and templates with {0} for the unique token and {1} for the class."""

    classes: Mapping[str, str]
    objects: tuple[str, ...]
    live: tuple[str, ...]

    def of(self, class_name: str) -> tuple[str, ...]:
        return self.live if class_name in LIVE_CLASSES and self.live else self.objects


@dataclass(frozen=True)
class Subject:
    """One subject: its class, its templates and its real images."""

    name: str
    class_name: str
    templates: tuple[str, ...]
    real: tuple[LazyImage, ...]

    def prompts(self, token: str) -> list[str]:
        """What a model is told: "a sks dog in the jungle"."""
        return [template.format(token, self.class_name) for template in self.templates]

    def texts(self) -> list[str]:
        """What CLIP-T compares with: the prompts without the unique token, "a dog in the jungle"."""
        return [" ".join(template.format("", self.class_name).split()) for template in self.templates]


@dataclass(frozen=True)
class SubjectImages:
    """Generated images of a subject; of each, the number of its prompt and, where known, its seed."""

    subject: Subject
    images: tuple[LazyImage, ...]
    numbers: tuple[int, ...]
    seeds: tuple[int | None, ...]


def read_prompts(path: str | Path) -> Prompts:
    """A `prompts_and_classes.txt`: read line by line, nothing in it is run.

    Raises: ValueError naming the first line that is none of the format's, or what is missing.
    """
    path = Path(path)
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a prompts file has at most {LARGEST:,}")
    found: dict[str, dict] = {name: {} for name in SECTIONS.values()}
    section = None
    for number, line in enumerate(text_lines(read_text(path)), 1):
        line = line.strip()
        pattern = CLASS if section == "classes" else TEMPLATE
        if line in SECTIONS:
            section = SECTIONS[line]
        elif line and line not in FURNITURE:
            match = pattern.fullmatch(line)
            if section is None or match is None:
                raise ValueError(f"{path}, line {number}: {line[:80]!r} is not of the dreambooth format")
            key = match["subject"] if section == "classes" else match["prompt"]
            found[section][key] = match["class"].strip() if section == "classes" else ""
    if not found["classes"] or not found["objects"]:
        raise ValueError(f"{path} lacks {' or '.join(n for n in ('classes', 'objects') if not found[n])}")
    return Prompts(found["classes"], tuple(found["objects"]), tuple(found["live"]))


def open_subjects(
    folder: str | Path, prompts: Prompts, names: Sequence[str] = (), *, follow_links: bool = False
) -> list[Subject]:
    """The subjects in a folder, one folder of images each; all of them, or those named.

    Raises: FileNotFoundError or ValueError for a subject without images or without a class.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of subjects at {str(folder)!r}")
    chosen = list(names) or sorted(path.name for path in folder.iterdir() if path.is_dir())
    found = []
    for name in chosen:
        if name not in prompts.classes:
            raise ValueError(
                f"subject {name!r} has no class in the prompts file{did_you_mean(name, prompts.classes)}"
            )
        class_name = prompts.classes[name]
        real = _real_images(name, folder / name, follow_links)
        found.append(Subject(name, class_name, prompts.of(class_name), real))
    if not found:
        raise ValueError(f"{folder} holds no folders; it needs one with images for each subject")
    return found


def embedded_subjects(names: Sequence[str] = ()) -> list[Subject]:
    """The shipped cat and monkey, in the contexts the embedded base knows."""
    templates = tuple(template.replace("{}", "{0} {1}") for template in EMOJI_CONTEXTS)
    unknown = [name for name in names if name not in EMBEDDED]
    if unknown:
        raise ValueError(f"no embedded subject {unknown[0]!r}; there are {', '.join(EMBEDDED)}")
    return [
        Subject(
            name, EMBEDDED[name], templates, _real_images(name, Path(resolve(f"embedded:subjects/{name}")))
        )
        for name in names or EMBEDDED
    ]


def existing_images(
    folder: str | Path, subjects: Sequence[Subject], *, follow_links: bool = False
) -> list[SubjectImages]:
    """Images made before: FOLDER/SUBJECT/NN-anything.png, or SUBJECT/NN/anything.png, NN the prompt's number.

    Raises: FileNotFoundError or ValueError for a subject without images, or a name without such a number.
    """
    found = []
    for subject in subjects:
        own = Path(folder) / subject.name
        paths = list_images(own, recursive=True, follow_links=follow_links)
        names = [path.relative_to(own).as_posix() for path in paths]
        numbers = [_prompt_number(name, subject) for name in names]
        pictures = [ImageFile(f"{subject.name}/{n}", path) for n, path in zip(names, paths, strict=True)]
        found.append(SubjectImages(subject, tuple(pictures), tuple(numbers), (None,) * len(names)))
    return found


def readable(images: SubjectImages, names: Collection[str]) -> SubjectImages:
    """Those of a subject's images whose names are among `names`."""
    rows = [row for row, picture in enumerate(images.images) if picture.name in names]
    return SubjectImages(
        images.subject,
        tuple(images.images[row] for row in rows),
        tuple(images.numbers[row] for row in rows),
        tuple(images.seeds[row] for row in rows),
    )


def joined(sets: Sequence[SubjectImages], *, source: str, kind: str) -> ImageSet:
    """The images of all subjects as one set, in order; prompts: subject and number of the prompt."""
    pictures = [picture for own in sets for picture in own.images]
    prompts = tuple(f"{own.subject.name} {number}" for own in sets for number in own.numbers)
    return ImageSet(source, kind, pictures, prompts=prompts)


def _prompt_number(name: str, subject: Subject) -> int:
    match, count = NUMBER.match(name), len(subject.templates)
    if match is None or int(match[1]) >= count:
        raise ValueError(
            f"image {subject.name}/{name} does not begin with the number of its prompt, 00 to "
            f"{count - 1:02d}; name images NN-anything.png, or put them into folders NN"
        )
    return int(match[1])


def _real_images(name: str, folder: Path, follow_links: bool = False) -> tuple[LazyImage, ...]:
    paths = list_images(folder, follow_links=follow_links)
    return tuple(ImageFile(f"{name}/{path.name}", path) for path in paths)
