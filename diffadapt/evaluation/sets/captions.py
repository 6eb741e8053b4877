"""Captions for images that somebody else generated, so that scores of images and texts can be had."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from diffadapt.common.atomic_files import read_text
from diffadapt.common.messages import did_you_mean, indented_list
from diffadapt.common.symlinks import visible_files
from diffadapt.data.captions import CaptionFiles, parse_caption
from diffadapt.data.metadata import read_caption_table
from diffadapt.evaluation.sets.image_files import FilePicture
from diffadapt.evaluation.sets.image_sets import ImageSet
from diffadapt.models.base_names import resolve

SIDECAR = "sidecar"


def with_captions(images: ImageSet, source: str, *, follow_links: bool = False) -> ImageSet:
    """The set with a caption of each image as its prompt.

    Args:
        source: "sidecar" (IMAGE.txt or IMAGE.caption beside each image), or a file: metadata.jsonl, .csv or
            .parquet with the columns file_name and text, or COCO's captions JSON, of which the first caption
            of an image is taken. Images are found by their name in the set, or the file's name, or that
            without its ending: whichever finds most of them.
        follow_links: of files beside images, also where links lead out of the folder.
    Raises: ValueError that lists the images without a caption; FileNotFoundError for a missing file.
    """
    if source == SIDECAR:
        captions = _beside(images, follow_links)
    else:
        captions = _matched(images, _read(Path(source)), source)
    missing = [name for name, text in captions.items() if not text]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(captions)} images of {images.source!r} have no caption in {source!r}:\n"
            f"{indented_list(missing)}"
        )
    prompts = tuple(captions[picture.name] for picture in images.pictures)
    return replace(images, prompts=prompts)


def _beside(images: ImageSet, follow_links: bool) -> dict[str, str]:
    """Image -> the caption of the file beside it, as training reads it; "" where there is none."""
    paths: dict[str, Path] = {}
    for picture in images.pictures:
        if not isinstance(picture, FilePicture) or not isinstance(picture.source, Path):
            raise ValueError(f"{picture.name}: only images in folders have a text file beside them")
        paths[picture.name] = picture.source
    folder = Path(resolve(images.source))
    files, _ = visible_files(folder, recursive=True, follow_links=follow_links)
    caption_files = CaptionFiles(files, folder, follow_links=follow_links)
    return {name: caption_files.caption(path) for name, path in paths.items()}


def _read(path: Path) -> dict[str, str]:
    """Name in the file -> caption."""
    if not path.is_file():
        raise FileNotFoundError(f"--captions {path}: there is no such file; give a file, or {SIDECAR}")
    kind = path.suffix.lower()
    if kind == ".json":
        return _coco(path)
    if kind not in (".jsonl", ".csv", ".parquet"):
        raise ValueError(f"--captions {path}: expected .jsonl, .csv, .parquet, COCO's .json, or {SIDECAR}")
    return read_caption_table(path)


def _coco(path: Path) -> dict[str, str]:
    """File name -> the first caption in COCO's annotations."""
    try:
        content = json.loads(read_text(path))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        found: dict[str, str] = {}
        for annotation in sorted(content["annotations"], key=lambda each: each["id"]):
            place = f"annotation {annotation['id']} of {path}"
            found.setdefault(names[annotation["image_id"]], parse_caption(annotation["caption"], place))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no COCO captions: {type(error).__name__} {error}") from None
    return found


def _matched(images: ImageSet, captions: Mapping[str, str], source: str) -> dict[str, str]:
    """Image -> caption, by that of three ways to write a name under which most images are found."""
    ways = (str, lambda name: PurePosixPath(name).name, lambda name: PurePosixPath(name).stem)
    names = [picture.name for picture in images.pictures]
    best: dict[str, str] = {}
    for way in ways:
        counts = Counter(map(way, captions))
        of_images = Counter(map(way, names))
        by_name = {way(name): text for name, text in captions.items() if counts[way(name)] == 1}
        unique = {name: way(name) for name in names if of_images[way(name)] == 1}
        found = {name: by_name.get(unique.get(name), "") for name in names}
        if sum(map(bool, found.values())) > sum(map(bool, best.values())):
            best = found
    if not best:
        raise ValueError(
            f"{source} names none of the images of {images.source!r}{did_you_mean(names[0], captions)}"
        )
    return best
