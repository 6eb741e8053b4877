"""Classes asked for by number, or by the names that training keeps in an adapter's file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffadapt.common.messages import did_you_mean
from diffadapt.formats.adapter_file import read_metadata


def read_class_names(files: Sequence[str]) -> dict[int, str]:
    """Names of classes by number, from the ``classes`` of adapter files; {} where none names any."""
    named: dict[int, str] = {}
    for file in files:
        classes = read_metadata(file).get("classes")
        items = classes.items() if isinstance(classes, dict) else ()
        named |= {int(label): str(name) for label, name in items if label.isdecimal()}
    return named


def parse_class_labels(text: str, classes: Mapping[int, str]) -> list[int]:
    """``0,3,ant`` as numbers. Raises: ValueError for an item that is neither a number nor a known name."""
    by_name = {name: label for label, name in classes.items()}
    items = [item.strip() for item in text.split(",")]
    for item in items:
        if not item.isdecimal() and item not in by_name:
            names = did_you_mean(item, by_name) if by_name else ""
            raise ValueError(f"--class_labels are numbers with commas, such as 0,3,7, got {text!r}{names}")
    return [int(item) if item.isdecimal() else by_name[item] for item in items]
