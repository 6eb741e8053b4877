"""What an adapter file may not tell PEFT. On the command line and in Python every option is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

_ALWAYS_ALLOWED_SIZE = 1024  # ranks up to this are in use, however little the file holds
_PLAIN_WORD = re.compile(r"[\w.\-]{0,200}")  # no regular expression that could run for ever
_EXTERNAL_ACCESS = re.compile("config|megatron|path|adapters|mapping|replication|revision|token")
_NOT_A_SIZE = re.compile("step|init|final|delta|seed|key", re.IGNORECASE)  # their numbers are no sizes


def check_options(name: str, options: Mapping[str, object]) -> None:
    """Refuses options by which PEFT would import or download something, or read a path.

    Raises:
        ValueError: there is such an option; names it.
    """
    for option, value in options.items():
        is_plain = all(_is_plain(leaf) for leaf in _leaves(value))
        if not is_plain or _EXTERNAL_ACCESS.search(str(option)):
            raise ValueError(f"{name}: a file must not set {option!r}; make the adapter in Python instead")


def check_sizes(name: str, options: Mapping[str, object], widest: int, stored: int) -> None:
    """Refuses ranks for which PEFT would take far more memory than the file has, before it takes it.

    Args:
        name: the method's name, for the message.
        options: the method's options in the file.
        widest: outputs and inputs of the widest layer together.
        stored: the number of values in the file.

    Raises:
        ValueError: there is such a rank; names its option.
    """
    for option, value in options.items():
        numbers = [abs(leaf) for leaf in _leaves(value) if type(leaf) in (int, float)]
        # a rank r stores about r values per output and input of a layer
        limit = max(_ALWAYS_ALLOWED_SIZE, stored // widest)
        if max(numbers, default=0) > limit and not _NOT_A_SIZE.search(option):
            raise ValueError(
                f"{name}: {option}={value!r} is more than a file of {stored} values can hold for these layers"
            )


def _is_plain(leaf: object) -> bool:
    """Whether a value is a number, a truth value, nothing, or a plain word."""
    if isinstance(leaf, str):
        return _PLAIN_WORD.fullmatch(leaf) is not None
    return leaf is None or type(leaf) in (bool, int, float)


def _leaves(value: object) -> Iterator[object]:
    """The values inside lists and mappings, keys too; any other value itself."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in value.items():
            yield from _leaves(item)
    else:
        yield value
