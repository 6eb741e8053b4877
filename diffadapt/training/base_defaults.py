"""Values of options that were not given: those of the demonstration, then those of the base's profile."""

import dataclasses
from collections.abc import Mapping
from dataclasses import fields

from diffadapt.common.runtime import launcher_accumulation
from diffadapt.models.base import BaseProfile
from diffadapt.models.families import profile_of
from diffadapt.training.options import OptionsT, TrainOptions


def complete_options(options: OptionsT, demo: Mapping[str, object], *, data: str, command: str) -> OptionsT:
    """Fills in the demonstration, if neither a base nor data is given, and then the defaults of the base.

    Args:
        demo: values of the demonstration; they never replace given ones.
        data: the option that names the data.
        command: a complete one, shown when something is missing.

    Raises:
        ValueError: a base is given without data, or data without a base or a prompt.
    """
    if options.pretrained_model_name_or_path is None and getattr(options, data) is None:
        options = fill_missing(options, demo)
    # Options that another script has, as the prompt, count as given.
    required = ("pretrained_model_name_or_path", data, "instance_prompt")
    missing = [f"--{name}" for name in required if getattr(options, name, "") is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ValueError(f"{' and '.join(missing)} {verb} missing; the full command:\n  {command}")
    defaults = base_profile(options).defaults
    return fill_missing(options, {**defaults, "gradient_accumulation_steps": launcher_accumulation()})


def fill_missing(options: OptionsT, defaults: Mapping[str, object]) -> OptionsT:
    """The options with defaults in the places left None; defaults of other scripts' options are ignored."""
    values = {}
    for field in fields(options):
        if field.name in defaults and getattr(options, field.name) is None:
            values[field.name] = defaults[field.name]
    return dataclasses.replace(options, **values)


def base_profile(options: TrainOptions) -> BaseProfile:
    """The defaults that suit the base of the run."""
    return profile_of(options.pretrained_model_name_or_path, revision=options.revision)
