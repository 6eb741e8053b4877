"""Methods from text: a name with options, or the list of methods in an adapter file."""

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
    """Makes a method from a registered name, e.g. `flora`, `flora(rank=8)` or `1lora+lora(rank=4)`.

    Args:
        name: a name, with options in parentheses, or several of them joined with `+`.
        **options: filled into every member that has such an option and does not set it itself.

    Raises:
        ValueError: the name or an option is unknown; names the nearest known one.
    """
    if name.startswith(PEFT):
        peft_type, spec_options = parse_peft_spec(name)
        return make_peft_method(peft_type, spec_options, options)
    specs = _parse_members(name)
    known_options = option_names(name)
    for option in options:
        if option not in known_options:
            raise ValueError(f"{name} has no option {option!r}{did_you_mean(option, known_options)}")
    members = tuple(_build(member, options | spec_options, strict=False) for member, spec_options in specs)
    return members[0] if len(members) == 1 else Combined(members=members)


def sets_option(name: str, option: str) -> bool:
    """Whether every member of `name` that has the option sets it, as `lora(rank=3)` sets `rank`."""
    if name.startswith(PEFT):
        return option in parse_peft_spec(name)[1]
    has_option = False
    for member, spec_options in _parse_members(name):
        if option in _option_names_of(member):
            has_option = True
            if option not in spec_options:
                return False
    return has_option


def option_names(name: str) -> set[str]:
    """The options of the members of a registered name or combination."""
    names: set[str] = set()
    for member, _ in _parse_members(name):
        names |= _option_names_of(member)
    return names


def read_method(entries: object) -> Method:
    """Makes the method that a file stores.

    Args:
        entries: one `{"name": ..., "options": {...}}` for each member.

    Raises:
        ValueError: `entries` is anything else, or holds an unknown name or option.
    """
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"expected a list of methods, got {entries!r}")
    members = []
    for entry in entries:
        is_complete = isinstance(entry, dict) and {"name", "options"} <= entry.keys()
        if not is_complete or type(entry["name"]) is not str or type(entry["options"]) is not dict:
            raise ValueError(f"expected a name and options, got {entry!r}")
        name = entry["name"]
        options = entry["options"]
        if name.startswith(PEFT) and len(entries) == 1:
            check_options(name, options)
            return make_peft_method(name.removeprefix(PEFT), options, {})
        if name not in READABLE:
            raise ValueError(f"unknown method {name!r}{did_you_mean(name, METHODS)}")
        members.append(_build(name, options))
    return members[0] if len(members) == 1 else Combined(members=tuple(members))


def with_class_table(name: str, classes: int, *, null_class: bool) -> str:
    """Adds a table for a new set of classes to the name of a method.

    `lora(rank=4)` becomes `lora(rank=4)+class_embedding(classes=20)`; a member that trains the class table
    already, such as `class_embedding`, gets the option `classes`.

    Args:
        name: a method's name, as for `make_method`.
        classes: the number of classes.
        null_class: whether the table has a row for "no class".

    Raises:
        ValueError: it is a method of PEFT's library, which cannot be combined.
    """
    if name.startswith(PEFT):
        raise ValueError(f"{name} cannot have a class table beside it; use a method of diffadapt's own")
    table_options = f"classes={classes}"
    if not null_class:
        table_options += ",null_class=false"
    specs = split_outside_brackets(name, "+")
    for number, spec in enumerate(specs):
        member, options = _parse_spec(spec)
        if "classes" in _option_names_of(member) and options.get("class_embedding", True):
            option_text = spec.partition("(")[2].removesuffix(")").strip()
            if option_text:
                option_text += ","
            specs[number] = f"{member}({option_text}{table_options})"
            return "+".join(specs)
    return "+".join([*specs, f"{ClassEmbedding.name}({table_options})"])


def _parse_members(name: str) -> list[tuple[str, dict]]:
    """Name and options of every member of a combination."""
    return [_parse_spec(spec) for spec in split_outside_brackets(name, "+")]


def _parse_spec(spec: str) -> tuple[str, dict]:
    """Name and options of one method, such as `lora(rank=4)`."""
    name, bracket, option_text = spec.partition("(")
    name = name.strip()
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}{did_you_mean(name, METHODS)}")
    if not bracket:
        return name, {}
    if not option_text.endswith(")"):
        raise ValueError(f"method {spec!r} lacks its closing parenthesis; write e.g. {name}(rank=4)")
    known_options = _option_names_of(name)
    options = {}
    for item in split_outside_brackets(option_text[:-1], ","):
        if not item:
            continue
        option, equals, value = item.partition("=")
        option = option.strip()
        if not equals or option not in known_options:
            raise ValueError(f"{name} has no option {option!r}{did_you_mean(option, known_options)}")
        options[option] = parse_literal(value.strip())
    return name, options


def _option_names_of(name: str) -> set[str]:
    """The options of one registered method."""
    return {field.name for field in fields(READABLE[name])}


def _build(name: str, options: dict, *, strict: bool = True) -> Method:
    """Makes one method; options that it does not have are an error, or left out where not `strict`."""
    known_options = _option_names_of(name)
    accepted = {}
    for option, value in options.items():
        if option in known_options:
            accepted[option] = value
        elif strict:
            raise ValueError(f"{name} has no option {option!r}{did_you_mean(str(option), known_options)}")
    try:
        return READABLE[name](**accepted)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error
