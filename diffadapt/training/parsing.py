"""Options from the command line and YAML files, and back into a file.

Values come from, in rising order: the dataclass, the base family's defaults (for fields left None, see
`defaults`), `--config`, the command line.
"""

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TypeVar

import yaml

from diffadapt.common.atomic_files import read_text, write_atomically
from diffadapt.common.messages import did_you_mean
from diffadapt.common.option_text import parse_literal, split_outside_brackets
from diffadapt.models.base_names import is_embedded
from diffadapt.training.options import TrainOptions

PATHS = (  # options that name files or folders
    *("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "output_dir", "cache_dir"),
    *("resume_from_checkpoint", "logging_dir", "extractor", "config", "instance_data_dir"),
    *("class_data_dir", "train_data_dir", "validation_data_dir", "dataset_name", "held_out"),
)
MISREAD_NUMBERS = re.compile(r"[-+]?(0[0-7_]+|[1-9][0-9_]*(:[0-5]?[0-9])+)")  # octal, base 60
MOST_NESTED = 8  # levels of a file of options
Kind = TypeVar("Kind", bound=TrainOptions)
OTHER_UNITS = {  # options of diffusers' scripts that count epochs, where steps are counted here
    "num_train_epochs": "--max_train_steps",
    "validation_epochs": "--validation_steps",
}
ELSEWHERE = {  # options of diffusers' scripts that have another name here
    "use_8bit_adam": "--optimizer adamw8bit",
    "lora_layers": "--targets",
    "lora_alpha": "--alpha",
    "lora_dropout": "--adapter_options dropout=0.1",
    "use_dora": "--adapter dora",
    "output_kohya_format": "--export_formats kohya",
    "hub_token": "the environment variable HF_TOKEN",
    "prodigy_safeguard_warmup": "--optimizer_options safeguard_warmup=true",
    "prodigy_use_bias_correction": "--optimizer_options use_bias_correction=true",
    "prodigy_decouple": "--optimizer_options decouple=true",
    "prodigy_beta3": "--optimizer_options beta3=0.99",
}


def parse(kind: type[Kind], argv: list[str] | None = None, *, description: str = "") -> Kind:
    """Options from the command line and its `--config` file.

    Raises: ValueError for an unknown option, or a value of the wrong type in the file.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for field in fields(kind):
        _add(parser, kind, field)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(_unknown(unknown[0], [field.name for field in fields(kind)]))
    given = {name: _expanded(name, value) for name, value in vars(known).items()}
    stored = read_config(kind, given["config"]) if given.get("config") else {}
    return kind(**{**stored, **given})


def read_config(kind: type[Kind], path: str | Path) -> dict[str, object]:
    """The values of a YAML file, converted to the types of the options."""
    try:
        text = read_text(path)
        _check_flat(text)
        values = yaml.safe_load(text)
    except OSError as error:
        raise FileNotFoundError(f"cannot read the config file {str(path)!r}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold lines of the form 'option: value'")
    names = [field.name for field in fields(kind)]
    for name in values:
        if name not in names:
            raise ValueError(f"unknown option {name!r} in {path}{did_you_mean(str(name), names)}")
    hints, choices = typing.get_type_hints(kind), {f.name: f.metadata["choices"] for f in fields(kind)}
    for name, value in values.items():
        if value is False and "no" in (choices[name] or ()):
            values[name] = value = "no"  # YAML 1.1 reads the word as false
        if choices[name] is not None and value is not None and value not in choices[name]:
            raise ValueError(f"{name} in {path} must be one of {', '.join(choices[name])}, got {value!r}")
    converted = {name: _converted(name, hints[name], value, path) for name, value in values.items()}
    return {name: _expanded(name, value) for name, value in converted.items()}


def _expanded(name: str, value: object) -> object:
    """A path with the home folder for its `~`; other values as they are."""
    if name in PATHS and isinstance(value, str) and value.startswith("~"):
        return str(Path(value).expanduser())
    return value


def _check_flat(text: str) -> None:
    """Raises: yaml.YAMLError for aliases, for nesting no option has, which takes for ever to read, and for
    numbers that YAML 1.1 takes for others: 010 is 8, 1:30 is 90."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) can stand for endless text and are not read")
        is_plain = isinstance(event, yaml.ScalarEvent) and event.implicit[0]
        if is_plain and MISREAD_NUMBERS.fullmatch(event.value):
            raise yaml.YAMLError(
                f"YAML reads {event.value} as {yaml.safe_load(event.value)}; write the number in decimal, "
                "or a text in quotes"
            )
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_NESTED:
            raise yaml.YAMLError(f"it nests deeper than {MOST_NESTED} levels")


def write_config(options: TrainOptions, folder: str | Path, *, heading: str = "") -> None:
    """Writes folder/config.yaml: every option as used, in a form that `--config` takes.

    Args:
        heading: comment lines before the options.
    """
    values = dataclasses.asdict(options)
    for name in ("config", "resume_from_checkpoint", "accept_changes", "overwrite_output_dir"):
        del values[name]
    demo = "# DEMO on the embedded base\n" if is_embedded(options.pretrained_model_name_or_path or "") else ""
    text = heading + demo + yaml.safe_dump(values, sort_keys=False)
    write_atomically(Path(folder) / "config.yaml", lambda path: path.write_text(text, encoding="utf-8"))


def pairs(text: str | None, option: str) -> dict[str, object]:
    """`a=1,b=[2,3],c=word` as a dictionary. Raises ValueError naming the option for anything else."""
    found: dict[str, object] = {}
    for part in filter(None, split_outside_brackets(text or "", ",")):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name:
            raise ValueError(f"{option} takes name=value,name=value; got {part!r}")
        found[name] = parse_literal(value)
    return found


def _unknown(argument: str, names: Sequence[str]) -> str:
    name = argument.partition("=")[0].lstrip("-")
    if not argument.startswith("-"):
        return f"{argument!r} belongs to no option; put values with spaces in quotes"
    if name in OTHER_UNITS:
        return (
            f"--{name}: a run is counted in optimizer steps here; give {OTHER_UNITS[name]}: "
            "epochs x images / (batch size x accumulation x processes)"
        )
    if name in ELSEWHERE:
        return f"--{name} is called {ELSEWHERE[name]} here"
    close = difflib.get_close_matches(name, names, n=3)
    meant = f"; did you mean {' or '.join(f'--{other}' for other in close)}?" if close else ""
    return f"unknown option {argument}{meant} (--help lists all)"


def _add(parser: argparse.ArgumentParser, kind: type, field: dataclasses.Field) -> None:
    hint = typing.get_type_hints(kind)[field.name]
    value_type = _value_type(hint)
    default = "" if field.default in (None, MISSING) else f" (default: {field.default})"
    settings = {"default": argparse.SUPPRESS, "help": field.metadata["help"].replace("%", "%%") + default}
    if value_type is bool:
        parser.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, **settings)
    else:
        choices = field.metadata["choices"]
        convert = value_type
        if value_type in (int, float) and isinstance(hint, types.UnionType):
            convert = _number_or_none(value_type)
        elif field.name == "param_budget":
            convert = _text_or_none
        parser.add_argument(f"--{field.name}", type=convert, choices=choices, **settings)


def _number_or_none(kind: type[int] | type[float]) -> Callable[[str], int | float | None]:
    """What reads an optional number; `none` takes back what a file of options sets."""

    def convert(text: str) -> int | float | None:
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = kind.__name__  # argparse names it in its message
    return convert


def _text_or_none(text: str) -> str | None:
    return None if text.lower() == "none" else text


def _value_type(hint: object) -> type:
    """`int` of `int | None`."""
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not types.NoneType)
    return hint


def _converted(name: str, hint: object, value: object, path: str | Path) -> object:
    value_type = _value_type(hint)
    if value is None and isinstance(hint, types.UnionType):
        return None
    if value_type is float and isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            return float(value)  # YAML reads 1e-4 as text
    if value_type is str and type(value) in (int, float):
        return str(value)  # as 500000 for a budget, or a folder called 7
    if type(value) is not value_type:
        raise ValueError(f"{name} in {path} must be of type {value_type.__name__}, got {value!r}")
    return value
