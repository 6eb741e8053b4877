"""What a run is trained on, as its checkpoints record it, so that a resumed run notices other data."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffadapt.common.images import ImageSource
from diffadapt.data.examples import Example, OrderedExamples
from diffadapt.data.stream import Stream

DIGITS = 16  # hexadecimal digits of a hash that are recorded
MOST_ITEMS = 50_000  # more images than this are recorded as one hash, not one by one
MOST_LISTED = 10  # changes of one kind in a message

Item = list[str]  # name, hash of the content, hash of the caption


def data_record(
    order: OrderedExamples | Stream, classes: Mapping[str, str] | None = None, *, is_streamed: bool = False
) -> dict[str, object]:
    """The images of a run with hashes of content and caption, in their order; JSON.

    What is streamed is not read for it: the record then says so, and the data are not compared.

    Args:
        classes: row of the class table -> name of the class.
        is_streamed: images are read when they are used, whatever their order is.
    """
    record: dict[str, object] = {}
    if classes is not None:
        record["classes"] = {name: int(row) for row, name in classes.items()}
    if is_streamed or isinstance(order, Stream):
        return {**record, "is_streamed": True}
    for role, examples in (("images", order.examples), ("class images", order.classes)):
        items = _items(examples)
        record[role] = {
            "count": len(items),
            "sha256": _hash(repr([item[1:] for item in items]).encode()),
            "items": items if len(items) <= MOST_ITEMS else [],
        }
    return record


def data_changes(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """What differs between the data of a checkpoint and that of this run, one line for each kind of change.

    Names and folders may differ: equal contents and captions in the same order are equal data.
    """
    lines = _class_changes(before.get("classes") or {}, now.get("classes") or {})
    for role in ("images", "class images"):
        first, second = before.get(role), now.get(role)
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
        first, second = before.get(name), now.get(name)
        if first is None:
            lines.append(f"class {name!r} is new, with label {second}")
        elif second is None:
            lines.append(f"class {name!r} is gone; it had label {first}")
        elif first != second:
            lines.append(f"class {name!r} had label {first} then, has {second} now")
    return lines


def _item_changes(role: str, before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    first = {name: values for name, *values in before["items"]}
    second = {name: values for name, *values in now["items"]}
    if not first or not second:
        return [f"{before['count']} {role} then, {now['count']} now, not all of them the same"]
    shared = [name for name in first if name in second]
    changes = {
        "added": [name for name in second if name not in first],
        "removed": [name for name in first if name not in second],
        "with other content": [name for name in shared if first[name][0] != second[name][0]],
        "with another caption": [name for name in shared if first[name][1] != second[name][1]],
    }
    lines = [f"{role} {kind}: {_listed(names)}" for kind, names in changes.items() if names]
    return lines or [f"the {role} are in another order"]


def _items(examples: Sequence[Example]) -> list[Item]:
    sources = [example.source for example in examples]
    folders = [str(source.parent) for source in sources if isinstance(source, Path)]
    folder = os.path.commonpath(folders) if folders else ""
    contents = {source: _content(source) for source in dict.fromkeys(sources)}  # repeated ones are read once
    items = []
    for example in examples:
        name = str(example.source)
        if isinstance(example.source, Path):
            name = os.path.relpath(name, folder or ".")
        items.append([name, contents[example.source], _hash(repr(example.caption).encode())])
    return items


def _content(source: ImageSource) -> str:
    return _hash(source.read_bytes())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def _listed(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > MOST_LISTED else ""
    return ", ".join(names[:MOST_LISTED]) + more
