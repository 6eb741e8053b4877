"""Options of the training scripts: names, types, defaults and help in one place.

A script's options are a frozen dataclass whose fields become command-line options. Values come from, in
rising order: the dataclass, the base family's defaults (for fields left None), `--config`, the command line.
"""

import argparse
import dataclasses
import types
import typing
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TypeVar

import yaml

from diffadapt.method_names import make_method
from diffadapt.methods import Method
from diffadapt.models.names import is_embedded
from diffadapt.models.sd import DEFAULTS, TUNED, family_of
from diffadapt.nearest import near

Kind = TypeVar("Kind", bound="TrainOptions")


def option(default: object, help: str, *, choices: tuple[str, ...] | None = None) -> typing.Any:
    """A dataclass field that is also a command-line option."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class TrainOptions:
    """What every training script understands. None: the default of the base's family."""

    pretrained_model_name_or_path: str | None = option(None, "base model: folder, hub name or embedded:NAME")
    revision: str | None = option(None, "revision of a base on the hub")
    variant: str | None = option(None, "variant of the base's files, as fp16")
    output_dir: str = option("runs/train", "where everything is written")
    seed: int = option(0, "data order, noise, timesteps and the adapter's start follow from it")
    resolution: int | None = option(None, "side of the training pictures in pixels; default: the base's own")
    center_crop: bool | None = option(None, "cut the middle of a picture instead of a random square")
    train_batch_size: int | None = option(None, "pictures per process and microstep")
    max_train_steps: int | None = option(None, "optimizer steps")
    checkpointing_steps: int = option(500, "write checkpoint-N every so many steps")
    resume_from_checkpoint: str | None = option(
        None, "'latest' or a checkpoint folder; the run goes on exactly"
    )
    gradient_accumulation_steps: int = option(1, "microsteps per optimizer step")
    gradient_checkpointing: bool = option(False, "recompute activations in backward: less memory, slower")
    learning_rate: float | None = option(None, "default: what the adapter's method recommends")
    lr_scheduler: str | None = option(
        None,
        "learning-rate schedule, by diffusers' name",
        choices=(
            "linear",
            "cosine",
            "cosine_with_restarts",
            "polynomial",
            "constant",
            "constant_with_warmup",
        ),
    )
    lr_warmup_steps: int = option(0, "steps of rising rate; at most a tenth of the run is used")
    adam_beta1: float = option(0.9, "AdamW")
    adam_beta2: float = option(0.999, "AdamW")
    adam_weight_decay: float = option(1e-2, "AdamW")
    adam_epsilon: float = option(1e-8, "AdamW")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    mixed_precision: str | None = option(
        None, "precision of the frozen base and of activations", choices=("no", "fp16", "bf16")
    )
    adapter: str = option("lora", "method, as flora or flora(rank=8); `diffadapt methods` lists them")
    rank: int | None = option(None, "rank of the adapter")
    alpha: float | None = option(None, "multiplier alpha/rank of the update")
    scale: float | None = option(None, "multiplier of the update, instead of alpha")
    adapter_options: str | None = option(None, "further fields of the method, as kernel_rank=2,init=gaussian")
    targets: str | None = option(
        None, "what is adapted: attention, qv, conv, linear, norm, all, A+B, or globs"
    )
    validation_prompt: str | None = option(
        None, "shown before and after; default: the subject in new contexts"
    )
    num_validation_images: int | None = option(None, "pictures made before and after; 0: none")
    num_inference_steps: int | None = option(None, "denoising steps of those pictures")
    guidance_scale: float | None = option(None, "classifier-free guidance of those pictures")
    sample_batch_size: int | None = option(None, "pictures drawn at once")
    export_formats: str = option(
        "kohya", "also written for other programs: kohya (ComfyUI, A1111), diffusers, merged, A,B or none"
    )
    extractor: str | None = option(None, "CLIP model for the figures: folder, hub name or embedded:clip")
    num_threads: int | None = option(None, "CPU threads; default: all available cores")
    config: str | None = option(None, "YAML file of options; the command line wins")


def parse(kind: type[Kind], argv: list[str] | None = None, *, description: str = "") -> Kind:
    """Options from the command line and its `--config` file.

    Raises: ValueError for an unknown key or a value of the wrong type in the file.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for field in fields(kind):
        _add(parser, kind, field)
    given = vars(parser.parse_args(argv))
    stored = read_config(kind, given["config"]) if given.get("config") else {}
    return kind(**{**stored, **given})


def read_config(kind: type[Kind], path: str | Path) -> dict[str, object]:
    """The values of a YAML file, converted to the types of the options."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise FileNotFoundError(f"cannot read the config file {str(path)!r}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold lines of the form 'option: value'")
    names = [field.name for field in fields(kind)]
    for name in values:
        if name not in names:
            raise ValueError(f"unknown option {name!r} in {path}{near(str(name), names)}")
    hints, choices = typing.get_type_hints(kind), {f.name: f.metadata["choices"] for f in fields(kind)}
    for name, value in values.items():
        if choices[name] is not None and value is not None and value not in choices[name]:
            raise ValueError(f"{name} in {path} must be one of {', '.join(choices[name])}, got {value!r}")
    return {name: _converted(name, hints[name], value, path) for name, value in values.items()}


def write_config(options: TrainOptions, folder: str | Path) -> None:
    """Writes folder/config.yaml: every option as used, in a form that `--config` takes."""
    values = dataclasses.asdict(options)
    for name in ("config", "resume_from_checkpoint"):
        del values[name]
    demo = "# DEMO on the embedded base\n" if is_embedded(options.pretrained_model_name_or_path or "") else ""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "config.yaml").write_text(demo + yaml.safe_dump(values, sort_keys=False))


def filled(options: Kind, defaults: dict[str, object]) -> Kind:
    """Options with the family's defaults in the places left None."""
    names = {field.name for field in fields(options)}
    missing = {k: v for k, v in defaults.items() if k in names and getattr(options, k) is None}
    return dataclasses.replace(options, **missing)


def choose_base(options: Kind, demo: dict[str, object], *, data: str, command: str) -> Kind:
    """The embedded demonstration when neither a base nor data is named, then the defaults of the base.

    Args:
        demo: values of the demonstration; they never replace given ones.
        data: the option that names the data.
        command: a complete one, shown when something is missing.
    Raises: ValueError when a base is given without data, or data without a base or a prompt.
    """
    if options.pretrained_model_name_or_path is None and getattr(options, data) is None:
        options = filled(options, demo)
    needed = ("pretrained_model_name_or_path", data, "instance_prompt")
    missing = [f"--{name}" for name in needed if getattr(options, name, "") is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ValueError(f"{' and '.join(missing)} {verb} missing; the full command:\n  {command}")
    return filled(options, DEFAULTS[family_of(options.pretrained_model_name_or_path)])


def build_method(options: TrainOptions) -> Method:
    """The method from `--adapter` and its options; without options, at the rank tuned on the base."""
    given = _method_options(options)
    method = make_method(options.adapter, **given)
    rank = _tuned(options, method).get("rank")
    if rank is not None and not given and options.adapter == method.name:
        method = make_method(options.adapter, rank=rank)
    return method


def recommended_rate(options: TrainOptions, method: Method) -> float:
    """The learning rate to use when none is given: tuned on this base, else the method's own."""
    return _tuned(options, method).get("learning_rate", method.learning_rate)


def _tuned(options: TrainOptions, method: Method) -> dict[str, float]:
    return TUNED[family_of(options.pretrained_model_name_or_path)].get(method.name, {})


def _method_options(options: TrainOptions) -> dict[str, object]:
    named = {name: getattr(options, name) for name in ("rank", "alpha", "scale")}
    chosen = {name: value for name, value in named.items() if value is not None}
    for part in filter(None, (options.adapter_options or "").split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"--adapter_options takes name=value,name=value; got {part!r}")
        chosen[name.strip()] = yaml.safe_load(value)
    return chosen


def _add(parser: argparse.ArgumentParser, kind: type, field: dataclasses.Field) -> None:
    value_type = _value_type(typing.get_type_hints(kind)[field.name])
    default = "" if field.default in (None, MISSING) else f" (default: {field.default})"
    settings = {"default": argparse.SUPPRESS, "help": field.metadata["help"].replace("%", "%%") + default}
    if value_type is bool:
        parser.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, **settings)
    else:
        parser.add_argument(f"--{field.name}", type=value_type, choices=field.metadata["choices"], **settings)


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
        try:
            return float(value)  # YAML reads 1e-4 as text
        except ValueError:
            pass
    if type(value) is not value_type:
        raise ValueError(f"{name} in {path} must be of type {value_type.__name__}, got {value!r}")
    return value
