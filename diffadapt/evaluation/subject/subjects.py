"""Subjects and prompts of DreamBooth's protocol, in the format of github.com/google/dreambooth."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffadapt.common.atomic_files import read_text, text_lines
from diffadapt.common.images import list_images
from diffadapt.common.messages import did_you_mean
from diffadapt.evaluation.sets.image_files import ImageFile, LazyImage
from diffadapt.evaluation.sets.image_sets import ImageSet
from diffadapt.models.base_names import resolve
from diffadapt.models.prompts import EMOJI_CONTEXTS

LIVE_CLASSES = ("cat", "dog")  # all live classes of the data set; they get the prompts for live subjects
EMBEDDED = {"cat": "cat face", "monkey": "monkey face"}  # shipped subject -> its class in the base's words
MAX_BYTES = 1 << 20  # of a prompts file
# A prompts file is text with lists in Python's syntax, of which each line is matched; nothing is run.
TEMPLATE = re.compile(
    r"""(['"])(?P<prompt>[^{}]{0,200}\{0\} \{1\}[^{}]{0,200})\1\.format\(unique_token, class_token\),?"""
)
CLASS = re.compile(r"(?P<subject>[\w .-]{1,100}),(?P<class>[\w .-]{1,100})")
SECTIONS = {"Classes": "classes", "Object Prompts": "objects", "Live Subject Prompts": "live"}
LINES_WITHOUT_CONTENT = ("Prompts", "prompt_list = [", "]", "subject_name,class")
PROMPT_NUMBER = re.compile(r"(\d{1,4})[-_/.]")  # where an image's name begins


@dataclass(frozen=True)
class Prompts:
    """The content of a prompts file.

    Attributes:
        classes: subject -> class.
        object_templates: for objects, with {0} for the unique token and {1} for the class.
        live_templates: the same for live subjects, cats and dogs.
    """

    classes: Mapping[str, str]
    object_templates: tuple[str, ...]
    live_templates: tuple[str, ...]

    def of(self, class_name: str) -> tuple[str, ...]:
        """The templates for subjects of a class."""
        is_live = class_name in LIVE_CLASSES and self.live_templates
        return self.live_templates if is_live else self.object_templates


@dataclass(frozen=True)
class Subject:
    """One subject: its class, its templates and its real images."""

    name: str
    class_name: str
    templates: tuple[str, ...]
    real: tuple[LazyImage, ...]

    def prompts(self, token: str) -> list[str]:
        """Prompts for generation: "a sks dog in the jungle"."""
        return [template.format(token, self.class_name) for template in self.templates]

    def texts(self) -> list[str]:
        """Texts for CLIP-T, the prompts without the unique token: "a dog in the jungle"."""
        texts = []
        for template in self.templates:
            words = template.format("", self.class_name).split()
            texts.append(" ".join(words))
        return texts


@dataclass(frozen=True)
class SubjectImages:
    """Generated images of a subject.

    Attributes:
        images: the images.
        numbers: of each image, the number of its prompt, from 0.
        seeds: of each image, its seed; None where it is unknown.
    """

    subject: Subject
    images: tuple[LazyImage, ...]
    numbers: tuple[int, ...]
    seeds: tuple[int | None, ...]


def read_prompts(path: str | Path) -> Prompts:
    """Reads a `prompts_and_classes.txt` line by line; nothing in it is run.

    Raises:
        ValueError: a line is not of the format (the first is named), or classes or prompts are missing.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; a prompts file has at most {MAX_BYTES:,}")
    classes: dict[str, str] = {}
    templates: dict[str, list[str]] = {"objects": [], "live": []}
    section = None
    for number, line in enumerate(text_lines(read_text(path)), 1):
        line = line.strip()
        if line in SECTIONS:
            section = SECTIONS[line]
            continue
        if not line or line in LINES_WITHOUT_CONTENT:
            continue  # headings, and the frame of a list in Python's syntax
        pattern = CLASS if section == "classes" else TEMPLATE
        match = pattern.fullmatch(line)
        if section is None or match is None:
            raise ValueError(f"{path}, line {number}: {line[:80]!r} is not of the dreambooth format")
        if section == "classes":
            classes[match["subject"]] = match["class"].strip()
        elif match["prompt"] not in templates[section]:
            templates[section].append(match["prompt"])
    missing = []
    if not classes:
        missing.append("classes")
    if not templates["objects"]:
        missing.append("objects")
    if missing:
        raise ValueError(f"{path} lacks {' or '.join(missing)}")
    return Prompts(classes, tuple(templates["objects"]), tuple(templates["live"]))


def open_subjects(
    folder: str | Path, prompts: Prompts, names: Sequence[str] = (), *, follow_links: bool = False
) -> list[Subject]:
    """The subjects in a folder, one folder of images each.

    Args:
        names: of the subjects to open; none for all.
        follow_links: follow links out of the folder too.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a subject has no images or no class.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of subjects at {str(folder)!r}")
    if not names:
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    subjects = []
    for name in names:
        if name not in prompts.classes:
            raise ValueError(
                f"subject {name!r} has no class in the prompts file{did_you_mean(name, prompts.classes)}"
            )
        class_name = prompts.classes[name]
        images = _real_images(name, folder / name, follow_links)
        subjects.append(Subject(name, class_name, prompts.of(class_name), images))
    if not subjects:
        raise ValueError(f"{folder} holds no folders; it needs one with images for each subject")
    return subjects


def embedded_subjects(names: Sequence[str] = ()) -> list[Subject]:
    """The cat and the monkey shipped with the package, in the contexts that the embedded base knows."""
    templates = tuple(template.replace("{}", "{0} {1}") for template in EMOJI_CONTEXTS)
    subjects = []
    for name in names or EMBEDDED:
        if name not in EMBEDDED:
            raise ValueError(f"no embedded subject {name!r}; there are {', '.join(EMBEDDED)}")
        images = _real_images(name, Path(resolve(f"embedded:subjects/{name}")))
        subjects.append(Subject(name, EMBEDDED[name], templates, images))
    return subjects


def existing_images(
    folder: str | Path, subjects: Sequence[Subject], *, follow_links: bool = False
) -> list[SubjectImages]:
    """Images that another program generated.

    They are FOLDER/SUBJECT/NN-anything.png or FOLDER/SUBJECT/NN/anything.png, NN the number of the prompt.

    Raises:
        FileNotFoundError: a subject has no folder.
        ValueError: a subject has no images, or a name does not begin with the number of a prompt.
    """
    images_of_subjects = []
    for subject in subjects:
        subject_folder = Path(folder) / subject.name
        paths = list_images(subject_folder, recursive=True, follow_links=follow_links)
        images = []
        numbers = []
        for path in paths:
            name = path.relative_to(subject_folder).as_posix()
            images.append(ImageFile(f"{subject.name}/{name}", path))
            numbers.append(_prompt_number(name, subject))
        seeds = (None,) * len(images)
        images_of_subjects.append(SubjectImages(subject, tuple(images), tuple(numbers), seeds))
    return images_of_subjects


def as_image_set(images_of_subjects: Sequence[SubjectImages], *, source: str) -> ImageSet:
    """The images of all subjects as one set, in order; subject and prompt's number serve as prompts."""
    images: list[LazyImage] = []
    prompts: list[str] = []
    for subject_images in images_of_subjects:
        images += subject_images.images
        for number in subject_images.numbers:
            prompts.append(f"{subject_images.subject.name} {number}")
    return ImageSet(source, "memory", images, prompts=tuple(prompts))


def _prompt_number(name: str, subject: Subject) -> int:
    match = PROMPT_NUMBER.match(name)
    count = len(subject.templates)
    if match is None or int(match[1]) >= count:
        raise ValueError(
            f"image {subject.name}/{name} does not begin with the number of its prompt, 00 to "
            f"{count - 1:02d}; name images NN-anything.png, or put them into folders NN"
        )
    return int(match[1])


def _real_images(name: str, folder: Path, follow_links: bool = False) -> tuple[LazyImage, ...]:
    paths = list_images(folder, follow_links=follow_links)
    return tuple(ImageFile(f"{name}/{path.name}", path) for path in paths)
