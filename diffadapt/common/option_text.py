"""Parsing of options written as text, such as `1lora+lora(rank=4)`. No text is run as code."""

from __future__ import annotations

import ast


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """Splits a text at a separator of one character outside of brackets, and strips the pieces."""
    pieces = [""]
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")  # brackets that are open here
        if character == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces]


def parse_literal(text: str) -> object:
    """Parses a number, a list, `true`, `false` or `none`; any other text is returned as it is."""
    # YAML's and JSON's spelling is accepted for Python's True, False and None
    python_text = text.capitalize() if text in ("true", "false", "none") else text
    try:
        return ast.literal_eval(python_text)
    except (ValueError, SyntaxError):
        return text
