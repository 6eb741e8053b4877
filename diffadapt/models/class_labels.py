"""Class labels on the command line: numbers, or the names that training keeps in an adapter's file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffadapt.common.messages import did_you_mean
from diffadapt.formats.adapter_file import read_metadata


def read_class_names(files: Sequence[str]) -> dict[int, str]:
    """Names of classes by number, from the `classes` of adapter files; empty where no file names any."""
    names: dict[int, str] = {}
    for file in files:
        classes = read_metadata(file).get("classes")
        if not isinstance(classes, dict):
            continue
        for label, name in classes.items():
            if label.isdecimal():
                names[int(label)] = str(name)
    return names


def parse_class_labels(text: str, names: Mapping[int, str]) -> list[int]:
    """Parses `0,3,ant` to numbers.

    Args:
        text: numbers and names, separated by commas.
        names: of classes, by number.

    Raises:
        ValueError: an item is neither a number nor a known name.
    """
    label_of_name = {name: label for label, name in names.items()}
    labels = []
    for item in text.split(","):
        item = item.strip()
        if item.isdecimal():
            labels.append(int(item))
        elif item in label_of_name:
            labels.append(label_of_name[item])
        else:
            suggestion = did_you_mean(item, label_of_name) if label_of_name else ""
            raise ValueError(
                f"--class_labels are numbers with commas, such as 0,3,7, got {text!r}{suggestion}"
            )
    return labels
