"""Options from the command line and YAML files, and back into a file.

Values come from, in rising order: the dataclass, the defaults of the base model's family (for fields left
None, see `base_defaults`), `--config`, the command line.
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

import yaml

from diffadapt.common.atomic_files import read_text, write_atomically
from diffadapt.common.messages import did_you_mean
from diffadapt.common.option_text import parse_literal, split_outside_brackets
from diffadapt.training.options import OptionsT, TrainOptions, option_group

PATH_OPTIONS = (  # options that name files or folders: a leading ~ is the home folder
    "pretrained_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "output_dir",
    "cache_dir",
    "resume_from_checkpoint",
    "logging_dir",
    "extractor",
    "config",
    "instance_data_dir",
    "class_data_dir",
    "train_data_dir",
    "validation_data_dir",
    "dataset_name",
    "held_out",
)
START_OPTIONS = (  # belong to one start of a run and are not repeated with it
    "config",
    "resume_from_checkpoint",
    "accept_changes",
    "overwrite_output_dir",
)
METAVARS = {int: "N", float: "X", str: "TEXT"}
MISREAD_NUMBERS = re.compile(r"[-+]?(0[0-7_]+|[1-9][0-9_]*(:[0-5]?[0-9])+)")  # octal, base 60
MAX_YAML_DEPTH = 8  # nesting levels of a file of options
EPILOG = (
    "Defaults 'by base model' depend on the family of the base model; a run writes every value it used to "
    "OUTPUT_DIR/config.yaml. Numbers can be reset to 'not given' with none, as in --rank none."
)
EPOCH_OPTIONS = {  # options of diffusers' scripts that count epochs, where steps are counted here
    "num_train_epochs": "--max_train_steps",
    "validation_epochs": "--validation_steps",
}
DIFFUSERS_ALIASES = {  # options of diffusers' scripts that have another name here
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


def parse(options_class: type[OptionsT], argv: list[str] | None = None, *, description: str = "") -> OptionsT:
    """Reads the options of a script from the command line and its `--config` file.

    Args:
        argv: the command line without the program; None: that of this process.
        description: first paragraph of `--help`.

    Raises:
        ValueError: an option is unknown, or a value in the file has the wrong type.
    """
    parser = _make_parser(options_class, description)
    # argparse would exit with its own message; ours names the option that was meant.
    namespace, unknown_words = parser.parse_known_args(argv)
    if unknown_words:
        names = [field.name for field in fields(options_class)]
        raise ValueError(_unknown_option_message(unknown_words[0], names))
    values = {}
    for name, value in vars(namespace).items():
        values[name] = _expand_home(name, value)
    if values.get("config"):
        file_values = read_config(options_class, values["config"])
        values = {**file_values, **values}  # the command line takes precedence
    return options_class(**values)


def read_config(options_class: type[OptionsT], path: str | Path) -> dict[str, object]:
    """Reads a YAML file and converts its values to the types of the options.

    Raises:
        FileNotFoundError: the file cannot be read.
        ValueError: the text is not YAML, an option is unknown, or does not take its value.
    """
    try:
        text = read_text(path)
        _check_yaml(text)
        values = yaml.safe_load(text)
    except OSError as error:
        raise FileNotFoundError(f"cannot read the config file {str(path)!r}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold lines of the form 'option: value'")
    options = {field.name: field for field in fields(options_class)}
    for name in values:
        if name not in options:
            raise ValueError(f"unknown option {name!r} in {path}{did_you_mean(str(name), options)}")
    hints = typing.get_type_hints(options_class)
    converted = {}
    for name, value in values.items():
        choices = options[name].metadata["choices"]
        if choices is not None:
            value = _check_choice(name, value, choices, path)
        converted[name] = _expand_home(name, _convert(name, hints[name], value, path))
    return converted


def write_config(options: TrainOptions, folder: str | Path, *, heading: str = "") -> None:
    """Writes folder/config.yaml: every option as used, in a form that `--config` takes.

    Args:
        heading: comment lines before the options.
    """
    values = dataclasses.asdict(options)
    for name in START_OPTIONS:
        del values[name]
    demo = "# DEMO on the embedded base\n" if options.is_demo else ""
    text = heading + demo + yaml.safe_dump(values, sort_keys=False)
    write_atomically(Path(folder) / "config.yaml", lambda path: path.write_text(text, encoding="utf-8"))


def parse_pairs(text: str | None, option: str) -> dict[str, object]:
    """Parses `a=1,b=[2,3],c=word` into a dictionary.

    Args:
        option: the option that holds the text, for messages.

    Raises:
        ValueError: the text has another form; the message names the option.
    """
    values: dict[str, object] = {}
    for pair in split_outside_brackets(text or "", ","):
        if not pair:
            continue
        name, equals, value = pair.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ValueError(f"{option} takes name=value,name=value; got {pair!r}")
        values[name] = parse_literal(value.strip())
    return values


def _make_parser(options_class: type[TrainOptions], description: str) -> argparse.ArgumentParser:
    """The command line of an options class, its options in the groups of `options`."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--OPTION VALUE ...]", description=description, epilog=EPILOG, allow_abbrev=False
    )
    # Groups are shown in the order of their creation: that of the script itself comes first.
    own_heading = option_group(options_class, fields(options_class)[-1].name)
    groups = {own_heading: parser.add_argument_group(own_heading)}
    for field in fields(options_class):
        heading = option_group(options_class, field.name)
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        _add_option(groups[heading], options_class, field)
    return parser


def _add_option(group: argparse._ArgumentGroup, options_class: type, field: dataclasses.Field) -> None:
    hint = typing.get_type_hints(options_class)[field.name]
    value_type = _value_type(hint)
    help_text = field.metadata["help"].replace("%", "%%")  # argparse formats help texts with %
    if not any(field.default is empty for empty in (None, False, MISSING)):
        help_text += f" (default: {field.default})"
    # An option that is not given must not hide the value of the config file.
    settings = {"default": argparse.SUPPRESS, "help": help_text}
    if value_type is bool:
        group.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, **settings)
        return
    choices = field.metadata["choices"]
    convert = value_type
    if value_type in (int, float) and isinstance(hint, types.UnionType):
        convert = _number_or_none(value_type)
    elif field.name == "param_budget":
        convert = _text_or_none
    if choices is None:
        settings["metavar"] = "PATH" if field.name in PATH_OPTIONS else METAVARS[value_type]
    group.add_argument(f"--{field.name}", type=convert, choices=choices, **settings)


def _number_or_none(number_type: type[int] | type[float]) -> Callable[[str], int | float | None]:
    """A converter for optional numbers, in which `none` takes back what a file of options sets."""

    def convert(text: str) -> int | float | None:
        return None if text.lower() == "none" else number_type(text)

    convert.__name__ = number_type.__name__  # argparse names it in its message
    return convert


def _text_or_none(text: str) -> str | None:
    return None if text.lower() == "none" else text


def _unknown_option_message(argument: str, names: Sequence[str]) -> str:
    name = argument.partition("=")[0].lstrip("-")
    if not argument.startswith("-"):
        return f"{argument!r} belongs to no option; put values with spaces in quotes"
    if name in EPOCH_OPTIONS:
        return (
            f"--{name}: a run is counted in optimizer steps here; give {EPOCH_OPTIONS[name]}: "
            "epochs x images / (batch size x accumulation x processes)"
        )
    if name in DIFFUSERS_ALIASES:
        return f"--{name} is called {DIFFUSERS_ALIASES[name]} here"
    matches = difflib.get_close_matches(name, names, n=3)
    suggestion = ""
    if matches:
        suggestion = f"; did you mean {' or '.join(f'--{match}' for match in matches)}?"
    return f"unknown option {argument}{suggestion} (--help lists all)"


def _expand_home(name: str, value: object) -> object:
    """A path with the home folder for its `~`; other values as they are."""
    if name in PATH_OPTIONS and isinstance(value, str) and value.startswith("~"):
        return str(Path(value).expanduser())
    return value


def _check_yaml(text: str) -> None:
    """Refuses what YAML allows and an option never needs.

    Raises:
        yaml.YAMLError: there are aliases, nesting so deep that it takes for ever to read, or numbers that
            YAML 1.1 takes for others (010 is 8, 1:30 is 90).
    """
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
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_YAML_DEPTH:
            raise yaml.YAMLError(f"it nests deeper than {MAX_YAML_DEPTH} levels")


def _check_choice(name: str, value: object, choices: Sequence[str], path: str | Path) -> object:
    """The value of an option with fixed choices; None is "not given"."""
    if value is False and "no" in choices:
        return "no"  # YAML 1.1 reads the word as false
    if value is not None and value not in choices:
        raise ValueError(f"{name} in {path} must be one of {', '.join(choices)}, got {value!r}")
    return value


def _value_type(hint: object) -> type:
    """`int` of `int | None`."""
    if isinstance(hint, types.UnionType):
        return next(member for member in typing.get_args(hint) if member is not types.NoneType)
    return hint


def _convert(name: str, hint: object, value: object, path: str | Path) -> object:
    """A value of a YAML file in the type of its option."""
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
