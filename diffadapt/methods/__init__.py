"""The registry of methods, and ``make_method``: a method from its name and options."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable
from dataclasses import fields

from diffadapt.methods.base import Method
from diffadapt.methods.class_embedding import ClassEmbedding
from diffadapt.methods.combined import Combined
from diffadapt.methods.difffit import DiffFit
from diffadapt.methods.dora import DoRA
from diffadapt.methods.flora import FLoRA
from diffadapt.methods.full import Full
from diffadapt.methods.imported import Imported
from diffadapt.methods.liera import LieRA
from diffadapt.methods.loha import LoHa
from diffadapt.methods.lokr import LoKr
from diffadapt.methods.lora import LoRA
from diffadapt.methods.mora import MoRA
from diffadapt.methods.one_lora import OneLoRA
from diffadapt.methods.peft_method import PREFIX as PEFT
from diffadapt.methods.peft_method import parse_peft, peft_method
from diffadapt.methods.pissa import PiSSA
from diffadapt.methods.ranked import RankedMethod
from diffadapt.methods.superlora import SuperLoRA
from diffadapt.methods.vectors import BitFit, Gamma, Norms
from diffadapt.methods.vera import VeRA

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        LoRA,
        DoRA,
        VeRA,
        MoRA,
        PiSSA,
        LoHa,
        LoKr,
        FLoRA,
        LieRA,
        SuperLoRA,
        OneLoRA,
        BitFit,
        DiffFit,
        Gamma,
        Norms,
        ClassEmbedding,
        Full,
    )
}

READABLE = {**METHODS, Imported.name: Imported}  # what a file can hold

__all__ = [
    "METHODS",
    "BitFit",
    "ClassEmbedding",
    "Combined",
    "DiffFit",
    "DoRA",
    "FLoRA",
    "Full",
    "Gamma",
    "LieRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "Method",
    "MoRA",
    "Norms",
    "OneLoRA",
    "PiSSA",
    "RankedMethod",
    "SuperLoRA",
    "VeRA",
    "make_method",
    "near",
    "read_method",
]


def make_method(name: str, **options) -> Method:
    """A method by registered name, e.g. ``flora``, ``flora(rank=8)`` or ``1lora+lora(rank=4)``.

    ``options`` fill every part that has such an option and does not set it itself.
    Raises ValueError for an unknown name or option, naming the nearest known one.
    """
    if name.startswith(PEFT):
        kind, own = parse_peft(name)
        return peft_method(kind, own, options)
    specs = [_parse(part) for part in _split_parts(name)]
    known = {field.name for spec, _ in specs for field in fields(METHODS[spec])}
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}{near(option, known)}")
    parts = tuple(_build(spec, own, options) for spec, own in specs)
    return parts[0] if len(parts) == 1 else Combined(members=parts)


def read_method(parts: object) -> Method:
    """The method of a file: ``[{"name": ..., "options": {...}}]``. Raises ValueError for anything else."""
    if not isinstance(parts, list) or not parts:
        raise ValueError(f"expected a list of methods, got {parts!r}")
    methods = []
    for part in parts:
        name, options = (part.get("name"), part.get("options")) if isinstance(part, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(options, dict):
            raise ValueError(f"expected a name and options, got {part!r}")
        if name.startswith(PEFT) and len(parts) == 1:
            return peft_method(name.removeprefix(PEFT), options, {})
        if name not in READABLE:
            raise ValueError(f"unknown method {name!r}{near(name, METHODS)}")
        known = {field.name for field in fields(READABLE[name])}
        for option in options:
            if option not in known:
                raise ValueError(f"{name} has no option {option!r}{near(str(option), known)}")
        methods.append(_build(name, options, {}))
    return methods[0] if len(methods) == 1 else Combined(members=tuple(methods))


def near(wrong: str, known: Iterable[str]) -> str:
    """The end of an error message: what was probably meant, and what there is."""
    known = sorted(known)
    close = difflib.get_close_matches(wrong, known, n=3, cutoff=0.5)
    meant = f"; did you mean {' or '.join(close)}?" if close else ";"
    shown = ", ".join(known[:20]) + (f", ... ({len(known)} in all)" if len(known) > 20 else "")
    return f"{meant} known: {shown or 'none'}"


def _split_parts(name: str) -> list[str]:
    """Split on the plus signs outside parentheses."""
    parts, depth = [""], 0
    for char in name:
        depth += (char == "(") - (char == ")")
        if char == "+" and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def _parse(part: str) -> tuple[str, dict]:
    name, bracket, inside = part.partition("(")
    name = name.strip()
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}{near(name, METHODS)}")
    if not bracket:
        return name, {}
    if not inside.endswith(")"):
        raise ValueError(f"method {part!r} lacks its closing parenthesis; write e.g. {name}(rank=4)")
    known, options = {field.name for field in fields(METHODS[name])}, {}
    for item in filter(None, (item.strip() for item in inside[:-1].split(","))):
        option, equals, text = (piece.strip() for piece in item.partition("="))
        if not equals or option not in known:
            raise ValueError(f"{name} has no option {option!r}{near(option, known)}")
        options[option] = _value(text)
    return name, options


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text.capitalize() if text in ("true", "false", "none") else text)
    except (ValueError, SyntaxError):
        return text  # a bare word, such as gaussian


def _build(name: str, own: dict, given: dict) -> Method:
    cls = READABLE[name]
    known = {field.name for field in fields(cls)}
    try:
        return cls(**{**{key: value for key, value in given.items() if key in known}, **own})
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error
