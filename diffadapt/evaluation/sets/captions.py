"""Captions for existing images, so that scores that compare images with text can be computed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from diffadapt.common.atomic_files import read_text
from diffadapt.common.messages import did_you_mean, indented_list
from diffadapt.common.symlinks import visible_files
from diffadapt.data.captions import CaptionFiles, parse_caption
from diffadapt.data.metadata import read_caption_table
from diffadapt.evaluation.sets.image_files import ImageFile
from diffadapt.evaluation.sets.image_sets import ImageSet
from diffadapt.models.base_names import resolve

SIDECAR = "sidecar"


def with_captions(image_set: ImageSet, source: str, *, follow_links: bool = False) -> ImageSet:
    """The set with a caption of each image as its prompt.

    Args:
        image_set: a set without prompts.
        source: "sidecar" (IMAGE.txt or IMAGE.caption beside each image), or a file: metadata.jsonl, .csv or
            .parquet with the columns file_name and text, or COCO's captions JSON, of which the first caption
            of an image is taken. Images are matched by their name in the set, by the file's name, or by the
            file's name without its suffix: whichever matches most of them.
        follow_links: follow links out of the folder to the text files too.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: images without a caption, which are listed, or a file that holds no captions.
    """
    if source == SIDECAR:
        captions = _sidecar_captions(image_set, follow_links)
    else:
        captions = _match_by_name(image_set, _read_captions(Path(source)), source)
    missing = [name for name, text in captions.items() if not text]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(captions)} images of {image_set.source!r} have no caption in {source!r}:"
            f"\n{indented_list(missing)}"
        )
    prompts = tuple(captions[image.name] for image in image_set.images)
    return replace(image_set, prompts=prompts)


def _sidecar_captions(image_set: ImageSet, follow_links: bool) -> dict[str, str]:
    """Image name -> caption of the file beside the image, as training reads it; "" where there is none."""
    paths: dict[str, Path] = {}
    for image in image_set.images:
        if not isinstance(image, ImageFile) or not isinstance(image.source, Path):
            raise ValueError(f"{image.name}: only images in folders have a text file beside them")
        paths[image.name] = image.source
    folder = Path(resolve(image_set.source))
    files, _ = visible_files(folder, recursive=True, follow_links=follow_links)
    caption_files = CaptionFiles(files, folder, follow_links=follow_links)
    captions = {}
    for name, path in paths.items():
        captions[name] = caption_files.caption(path)
    return captions


def _read_captions(path: Path) -> dict[str, str]:
    """File name -> caption."""
    if not path.is_file():
        raise FileNotFoundError(f"--captions {path}: there is no such file; give a file, or {SIDECAR}")
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _read_coco_captions(path)
    if suffix not in (".jsonl", ".csv", ".parquet"):
        raise ValueError(f"--captions {path}: expected .jsonl, .csv, .parquet, COCO's .json, or {SIDECAR}")
    return read_caption_table(path)


def _read_coco_captions(path: Path) -> dict[str, str]:
    """File name -> the first caption in COCO's annotations, in the order of their ids."""
    captions: dict[str, str] = {}
    try:
        content = json.loads(read_text(path))
        # {"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}
        file_names = {image["id"]: image["file_name"] for image in content["images"]}
        for annotation in sorted(content["annotations"], key=lambda entry: entry["id"]):
            place = f"annotation {annotation['id']} of {path}"
            file_name = file_names[annotation["image_id"]]
            captions.setdefault(file_name, parse_caption(annotation["caption"], place))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no COCO captions: {type(error).__name__} {error}") from None
    return captions


def _match_by_name(image_set: ImageSet, captions: Mapping[str, str], source: str) -> dict[str, str]:
    """Image name -> caption, by whichever spelling of the names matches most images; "" without a match."""
    # "val/1.jpg" in the set may be "val/1.jpg", "1.jpg" or "1" in the file.
    spellings = (str, lambda name: PurePosixPath(name).name, lambda name: PurePosixPath(name).stem)
    names = image_set.names
    best: dict[str, str] = {}
    for spelling in spellings:  # the first of equally good ones
        matched = _match_by_spelling(names, captions, spelling)
        if _count_captions(matched) > _count_captions(best):
            best = matched
    if not best:
        raise ValueError(
            f"{source} names none of the images of {image_set.source!r}{did_you_mean(names[0], captions)}"
        )
    return best


def _match_by_spelling(
    names: list[str], captions: Mapping[str, str], spelling: Callable[[str], str]
) -> dict[str, str]:
    """Image name -> caption; "" where a name, so written, is missing or stands for several files."""
    caption_counts = Counter(map(spelling, captions))
    image_counts = Counter(map(spelling, names))
    # a name that several files share after shortening ("a/1.jpg" and "b/1.jpg" as "1.jpg") says nothing
    unique_captions = {}
    for name, text in captions.items():
        if caption_counts[spelling(name)] == 1:
            unique_captions[spelling(name)] = text
    matched = {}
    for name in names:
        is_unique = image_counts[spelling(name)] == 1
        matched[name] = unique_captions.get(spelling(name), "") if is_unique else ""
    return matched


def _count_captions(captions: Mapping[str, str]) -> int:
    return sum(bool(text) for text in captions.values())
