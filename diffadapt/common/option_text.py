"""Options written as text: ``rank=8,init=gaussian``, ``1lora+lora(rank=4)``. Nothing in them is run."""

from __future__ import annotations

import ast


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """The pieces between the separators (one character) that stand outside of brackets, without blanks."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def parse_literal(text: str) -> object:
    """A number, list, true, false or none; anything else is a bare word, such as gaussian."""
    try:
        return ast.literal_eval(text.capitalize() if text in ("true", "false", "none") else text)
    except (ValueError, SyntaxError):
        return text
