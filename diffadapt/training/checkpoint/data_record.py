"""Fingerprints of a run's training data in its checkpoints, so that a resumed run notices other data."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffadapt.common.images import ImageSource
from diffadapt.data.examples import Example, OrderedExamples
from diffadapt.data.stream import Stream

DIGITS = 16  # hexadecimal digits of a hash that are recorded
MAX_ITEMS = 50_000  # more images than this are recorded as one hash, not one by one
MAX_LISTED = 10  # changes of one kind in a message

Item = list[str]  # name, hash of the content, hash of the caption


def data_record(
    order: OrderedExamples | Stream, classes: Mapping[str, str] | None = None, *, is_streamed: bool = False
) -> dict[str, object]:
    """The images of a run with hashes of content and caption, in their order; JSON.

    Streamed data are not read for it: the record then says so, and the data are not compared.

    Args:
        classes: row of the class table -> name of the class.
        is_streamed: whether images are read only when they are needed, whatever their order is.
    """
    record: dict[str, object] = {}
    if classes is not None:
        record["classes"] = {name: int(row) for row, name in classes.items()}
    if is_streamed or isinstance(order, Stream):
        record["is_streamed"] = True
        return record
    record["images"] = _examples_record(order.examples)
    record["class images"] = _examples_record(order.classes)
    return record


def data_changes(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """The differences between the data of a checkpoint and of this run, one line for each kind of change.

    Names and folders may differ: equal contents and captions in the same order are equal data.

    Args:
        before: `data_record` of the checkpoint.
        now: `data_record` of this run.
    """
    lines = _class_changes(before.get("classes") or {}, now.get("classes") or {})
    for role in ("images", "class images"):
        first = before.get(role)
        second = now.get(role)
        # One hash over all contents and captions in their order, whatever the names are.
        if first is None or second is None or first["sha256"] == second["sha256"]:
            continue
        lines += _item_changes(role, first, second)
    return lines


def is_compared(before: Mapping[str, object], now: Mapping[str, object]) -> bool:
    """Whether both records know their images, so that paths need not be compared."""
    return "images" in before and "images" in now


def _class_changes(before: Mapping[str, int], now: Mapping[str, int]) -> list[str]:
    lines = []
    for name in sorted({*before, *now}):
        first = before.get(name)
        second = now.get(name)
        if first is None:
            lines.append(f"class {name!r} is new, with label {second}")
        elif second is None:
            lines.append(f"class {name!r} is gone; it had label {first}")
        elif first != second:
            lines.append(f"class {name!r} had label {first} then, has {second} now")
    return lines


def _item_changes(role: str, before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Lines about images that were added, removed or reordered, or have another content or caption."""
    first = {name: hashes for name, *hashes in before["items"]}
    second = {name: hashes for name, *hashes in now["items"]}
    if not first or not second:  # too many images to be listed one by one
        return [f"{before['count']} {role} then, {now['count']} now, not all of them the same"]
    changes: dict[str, list[str]] = {
        "added": [name for name in second if name not in first],
        "removed": [],
        "with other content": [],
        "with another caption": [],
    }
    for name, (content, caption) in first.items():
        if name not in second:
            changes["removed"].append(name)
            continue
        new_content, new_caption = second[name]
        if content != new_content:
            changes["with other content"].append(name)
        if caption != new_caption:
            changes["with another caption"].append(name)
    lines = []
    for kind, names in changes.items():
        if names:
            lines.append(f"{role} {kind}: {_shorten(names)}")
    # the hashes over everything differ, so with equal items it is their order
    return lines or [f"the {role} are in another order"]


def _examples_record(examples: Sequence[Example]) -> dict[str, object]:
    items = _items(examples)
    hashes = [item[1:] for item in items]  # without names: moved images are the same images
    return {
        "count": len(items),
        "sha256": _hash(repr(hashes).encode()),
        "items": items if len(items) <= MAX_ITEMS else [],
    }


def _items(examples: Sequence[Example]) -> list[Item]:
    """Name and hashes of each example; files are named relative to the folder that holds all of them."""
    folders = []
    for example in examples:
        if isinstance(example.source, Path):
            folders.append(str(example.source.parent))
    root = os.path.commonpath(folders) if folders else ""
    content_hashes: dict[ImageSource, str] = {}  # an image that is repeated is read once
    items = []
    for example in examples:
        if example.source not in content_hashes:
            content_hashes[example.source] = _hash(example.source.read_bytes())
        name = str(example.source)
        if isinstance(example.source, Path):
            name = os.path.relpath(name, root or ".")
        # repr, because a class's caption is a number, and 1 is not "1"
        caption_hash = _hash(repr(example.caption).encode())
        items.append([name, content_hashes[example.source], caption_hash])
    return items


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def _shorten(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
