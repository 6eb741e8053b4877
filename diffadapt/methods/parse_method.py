"""Methods from text: a name with options, or what a file says."""

from __future__ import annotations

from dataclasses import fields

from diffadapt.common.messages import did_you_mean
from diffadapt.common.option_text import parse_literal, split_outside_brackets
from diffadapt.methods import METHODS, READABLE, Combined, Method
from diffadapt.methods.class_embedding import ClassEmbedding
from diffadapt.methods.peft_config import PREFIX as PEFT
from diffadapt.methods.peft_config import make_peft_method, parse_peft_spec
from diffadapt.methods.peft_limits import check_options


def make_method(name: str, **options) -> Method:
    """A method by registered name, e.g. ``flora``, ``flora(rank=8)`` or ``1lora+lora(rank=4)``.

    ``options`` fill every part that has such an option and does not set it itself.
    Raises ValueError for an unknown name or option, naming the nearest known one.
    """
    if name.startswith(PEFT):
        kind, own = parse_peft_spec(name)
        return make_peft_method(kind, own, options)
    specs = [_parse(part) for part in split_outside_brackets(name, "+")]
    known = {field.name for spec, _ in specs for field in fields(METHODS[spec])}
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}{did_you_mean(option, known)}")
    parts = tuple(_build(spec, own, options) for spec, own in specs)
    return parts[0] if len(parts) == 1 else Combined(members=parts)


def sets_option(name: str, option: str) -> bool:
    """Whether every part of ``name`` that has the option sets it, as ``lora(rank=3)`` sets ``rank``."""
    if name.startswith(PEFT):
        return option in parse_peft_spec(name)[1]
    specs = [_parse(part) for part in split_outside_brackets(name, "+")]
    having = [own for kind, own in specs if option in {field.name for field in fields(METHODS[kind])}]
    return bool(having) and all(option in own for own in having)


def option_names(name: str) -> set[str]:
    """The options that the parts of a registered name or combination have."""
    specs = [_parse(part) for part in split_outside_brackets(name, "+")]
    return {field.name for kind, _ in specs for field in fields(METHODS[kind])}


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
            check_options(name, options)
            return make_peft_method(name.removeprefix(PEFT), options, {})
        if name not in READABLE:
            raise ValueError(f"unknown method {name!r}{did_you_mean(name, METHODS)}")
        known = {field.name for field in fields(READABLE[name])}
        for option in options:
            if option not in known:
                raise ValueError(f"{name} has no option {option!r}{did_you_mean(str(option), known)}")
        methods.append(_build(name, options, {}))
    return methods[0] if len(methods) == 1 else Combined(members=tuple(methods))


def with_class_table(name: str, classes: int, *, null_class: bool) -> str:
    """The name of the same method with a table for a new set of classes: ``lora(rank=4)`` becomes
    ``lora(rank=4)+class_embedding(classes=20)``, and ``class_embedding`` gets the option.

    Raises ValueError for a method of PEFT's library, which stands alone.
    """
    if name.startswith(PEFT):
        raise ValueError(f"{name} cannot have a class table beside it; use a method of diffadapt's own")
    wanted = f"classes={classes}" + ("" if null_class else ",null_class=false")
    parts = split_outside_brackets(name, "+")
    for number, part in enumerate(parts):
        kind, own = _parse(part)
        if "classes" in {field.name for field in fields(METHODS[kind])} and own.get("class_embedding", True):
            inside = part.partition("(")[2].removesuffix(")").strip()
            parts[number] = f"{kind}({inside}{',' * bool(inside)}{wanted})"
            return "+".join(parts)
    return "+".join([*parts, f"{ClassEmbedding.name}({wanted})"])


def _parse(part: str) -> tuple[str, dict]:
    name, bracket, inside = part.partition("(")
    name = name.strip()
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}{did_you_mean(name, METHODS)}")
    if not bracket:
        return name, {}
    if not inside.endswith(")"):
        raise ValueError(f"method {part!r} lacks its closing parenthesis; write e.g. {name}(rank=4)")
    known, options = {field.name for field in fields(METHODS[name])}, {}
    for item in filter(None, split_outside_brackets(inside[:-1], ",")):
        option, equals, text = (piece.strip() for piece in item.partition("="))
        if not equals or option not in known:
            raise ValueError(f"{name} has no option {option!r}{did_you_mean(option, known)}")
        options[option] = parse_literal(text)
    return name, options


def _build(name: str, own: dict, given: dict) -> Method:
    cls = READABLE[name]
    known = {field.name for field in fields(cls)}
    try:
        return cls(**{**{key: value for key, value in given.items() if key in known}, **own})
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error
