"""What an adapter file may not tell PEFT. On the command line and in Python every option is free."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

_SMALL = 1024  # a size of use, whatever the file's own
_WORD = re.compile(r"[\w.\-]{0,200}")  # no pattern that could take for ever to match
_REACHES_OUT = re.compile("config|megatron|path|adapters|mapping|replication|revision|token")
_COUNTS = re.compile("step|init|final|delta|seed|key", re.IGNORECASE)  # numbers that are no sizes


def check_options(name: str, options: Mapping[str, object]) -> None:
    """Raises ValueError naming an option by which PEFT would import or fetch something, or read a path."""
    for option, value in options.items():
        plain = all(
            part is None
            or type(part) in (bool, int, float)
            or (isinstance(part, str) and _WORD.fullmatch(part) is not None)
            for part in _parts(value)
        )
        if not plain or _REACHES_OUT.search(str(option)):
            raise ValueError(f"{name}: a file must not set {option!r}; make the adapter in Python instead")


def check_sizes(name: str, options: Mapping[str, object], widest: int, stored: int) -> None:
    """Refuses ranks for which PEFT would take far more memory than the file has, before it takes it.

    Args:
        widest: outputs and inputs of the widest layer together.
        stored: the number of values in the file.

    Raises: ValueError naming the option.
    """
    for option, value in options.items():
        sizes = [abs(part) for part in _parts(value) if type(part) in (int, float)]
        if max(sizes, default=0) > max(_SMALL, stored // widest) and not _COUNTS.search(option):
            raise ValueError(
                f"{name}: {option}={value!r} is more than a file of {stored} values can hold for these layers"
            )


def _parts(value: object) -> Iterator[object]:
    """What is in lists and mappings, keys too; else the value."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _parts(part)
    elif isinstance(value, dict):
        yield from (part for pair in value.items() for part in _parts(list(pair)))
    else:
        yield value
