"""What is used where nothing is said: the embedded demonstration, the family's defaults, the tuned method."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import fields

from diffadapt.adapters.budget import fit_budget, parse_budget, size_notices
from diffadapt.common.number_ranges import require_seed
from diffadapt.common.runtime import launcher_accumulation
from diffadapt.methods import Method
from diffadapt.methods.parse_method import make_method, sets_option
from diffadapt.models.base import BaseProfile
from diffadapt.models.families import profile_of
from diffadapt.training.options import OptionsT, TrainOptions
from diffadapt.training.parsing import parse_pairs

OWN_RATE = {"prodigy": 1.0}  # optimizers that estimate the rate: what they are given is a factor

SHARES = ("caption_dropout", "label_dropout", "ema_decay", "adam_beta1", "adam_beta2")

LEAST = {  # the smallest values that make sense
    (
        "resolution",
        "train_batch_size",
        "max_train_steps",
        "checkpoints_total_limit",
        "gradient_accumulation_steps",
        "lr_num_cycles",
        "validation_steps",
        "log_adapter_stats",
        "num_inference_steps",
        "sample_batch_size",
        "num_class_images",
        "max_train_samples",
        "shuffle_buffer",
        "num_threads",
    ): 1,
    (
        "checkpointing_steps",
        "lr_warmup_steps",
        "learning_rate",
        "text_encoder_lr",
        "max_grad_norm",
        "snr_gamma",
        "noise_offset",
        "skip_nonfinite",
        "num_validation_images",
        "guidance_scale",
        "prior_loss_weight",
        "adam_epsilon",
        "adam_weight_decay",
    ): 0,
}


MAY_BE_INFINITE = ("max_grad_norm", "snr_gamma")  # nothing is clipped; all timesteps weigh the same


def filled(options: OptionsT, defaults: Mapping[str, object]) -> OptionsT:
    """Options with the given defaults in the places left None."""
    names = {field.name for field in fields(options)}
    missing = {k: v for k, v in defaults.items() if k in names and getattr(options, k) is None}
    return dataclasses.replace(options, **missing)


def choose_base(options: OptionsT, demo: Mapping[str, object], *, data: str, command: str) -> OptionsT:
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
    defaults = base_profile(options).defaults
    return filled(options, {**defaults, "gradient_accumulation_steps": launcher_accumulation()})


def check_ranges(options: TrainOptions) -> None:
    """Raises: ValueError naming an option with a value outside of what makes sense."""
    require_seed(options.seed)
    if options.snr_gamma == 0:
        raise ValueError("--snr_gamma 0 gives every timestep no weight; leave it out, or give 5 as the paper")
    for name in SHARES:
        value = getattr(options, name, None)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"--{name} is a share between 0 and 1, got {value}")
    for names, least in LEAST.items():
        for name in names:
            value = getattr(options, name, None)
            if value is not None and not value >= least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
            if value == math.inf and name not in MAY_BE_INFINITE:
                raise ValueError(f"--{name} must be a finite number, got {value}")


def build_method(options: TrainOptions) -> Method:
    """The method from `--adapter` and its options; without options, at the rank tuned on the base.

    With `--param_budget` its rank is still to be fitted, by `fitted`.
    """
    given = _method_options(options)
    method = make_method(options.adapter, **given)
    rank = _tuned(options, method).get("rank")
    if rank is not None and not given and options.adapter == method.name and options.param_budget is None:
        method = make_method(options.adapter, rank=rank)
    return method


def fitted(options: TrainOptions, method: Method, model: object) -> Method:
    """The method at the rank that `--param_budget` allows on the model; without a budget, unchanged.

    Raises: ValueError when a rank is given too, or when nothing fits.
    """
    if options.param_budget is None:
        return method
    given = _method_options(options)
    if "rank" in given or sets_option(options.adapter, "rank"):
        raise ValueError("--param_budget chooses the rank; leave --rank out, or set it to none")
    return fit_budget(
        model,
        options.adapter,
        targets=options.targets,
        text_encoder_targets=text_targets(options),
        budget=parse_budget(options.param_budget),
        **given,
    )


def budget_notices(options: TrainOptions, method: Method, model: object) -> list[str]:
    """Lines about a rank that `--param_budget` chose and that is larger than the layers; none without it."""
    if options.param_budget is None:
        return []
    return size_notices(model, method, options.targets, text_encoder_targets=text_targets(options))


def check_text_encoders(options: TrainOptions) -> None:
    """Raises: ValueError for a rate of the text encoders where the optimizer finds its own."""
    if options.text_encoder_lr is not None and options.optimizer.lower() in OWN_RATE:
        raise ValueError(
            f"--text_encoder_lr: {options.optimizer} finds one rate for everything; leave it out, or take "
            "another --optimizer"
        )


def text_targets(options: TrainOptions) -> str | None:
    """What of the text encoders is adapted; None: nothing."""
    return (options.text_encoder_targets or "attention") if options.train_text_encoder else None


def recommended_rate(options: TrainOptions, method: Method) -> float:
    """The rate when none is given: the optimizer's own, else tuned on this base, else the method's."""
    own = OWN_RATE.get(options.optimizer.lower())
    return own or _tuned(options, method).get("learning_rate", method.learning_rate)


def preferred_precision(options: TrainOptions) -> str:
    """Precision of the base's activations where the machine is fast in it."""
    return base_profile(options).defaults["preferred_precision"]


def base_profile(options: TrainOptions) -> BaseProfile:
    """What suits the base of the run."""
    return profile_of(options.pretrained_model_name_or_path, revision=options.revision)


def _tuned(options: TrainOptions, method: Method) -> Mapping[str, float]:
    return base_profile(options).tuned_methods.get(method.name, {})


def _method_options(options: TrainOptions) -> dict[str, object]:
    named = {name: getattr(options, name) for name in ("rank", "alpha", "scale")}
    chosen = {name: value for name, value in named.items() if value is not None}
    further = parse_pairs(options.adapter_options, "--adapter_options")
    for name in sorted({*chosen} & {*further}):
        other = f"--adapter_options {name}={further[name]}"
        raise ValueError(f"--{name} {chosen[name]} and {other} exclude each other; give one of them")
    for name, value in {**chosen, **further}.items():
        if sets_option(options.adapter, name):
            raise ValueError(
                f"{name} {value} has no effect: --adapter {options.adapter!r} sets {name} itself; "
                "give one of them"
            )
    return {**chosen, **further}
