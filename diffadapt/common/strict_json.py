"""JSON that every reader accepts: NaN and infinity, which JSON does not have, are written as strings.

"NaN", "Infinity" and "-Infinity" are their names in ECMAScript (ECMA-262, section 6.1.6.1).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_json(content: object) -> str:
    """Strict JSON, indented and ending with a line feed.

    Args:
        content: anything `json.dumps` takes; floats in it need not be finite.

    Raises:
        TypeError: the content cannot be written as JSON.
    """
    return json.dumps(_without_constants(content), indent=1, allow_nan=False) + "\n"


def parse_number(value: object) -> float | int | None:
    """A number as `to_json` wrote it; None stays None.

    Raises:
        ValueError: the value is not a number.
    """
    if isinstance(value, str) and value in NAMES:
        return NAMES[value]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)  # True is an int
    if value is None or is_number:
        return value
    raise ValueError(f"expected a number, got {value!r}")


def _without_constants(content: object) -> object:
    """The content with every float that is not finite replaced by its name."""
    if isinstance(content, float):
        return content if math.isfinite(content) else _name(content)
    if isinstance(content, Mapping):
        return {key: _without_constants(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_constants(value) for value in content]
    return content


def _name(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"
