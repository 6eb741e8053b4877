"""The adapter method that the options describe: its fields, its rank on the base, its learning rate."""

from collections.abc import Mapping

from diffadapt.adapters.budget import fit_budget, parse_budget, size_notices
from diffadapt.methods import Method
from diffadapt.methods.parse_method import make_method, sets_option
from diffadapt.training.base_defaults import base_profile
from diffadapt.training.option_checks import OPTIMIZER_DEFAULT_LR
from diffadapt.training.options import TrainOptions
from diffadapt.training.parsing import parse_pairs


def build_method(options: TrainOptions) -> Method:
    """The method of `--adapter` with its options; without options, at the rank that was tuned on the base.

    With `--param_budget` its rank is still to be fitted, by `fit_to_budget`.

    Raises:
        ValueError: a method or option is unknown, or options contradict each other.
    """
    method_options = _method_options(options)
    method = make_method(options.adapter, **method_options)
    tuned_rank = _tuned_values(options, method).get("rank")
    is_bare_name = options.adapter == method.name and not method_options
    # A tuned rank never replaces a choice: not a field of the method, and not a budget.
    if tuned_rank is not None and is_bare_name and options.param_budget is None:
        method = make_method(options.adapter, rank=tuned_rank)
    return method


def fit_to_budget(options: TrainOptions, method: Method, model: object) -> Method:
    """The method at the largest rank that `--param_budget` allows on the model; without a budget, unchanged.

    Raises:
        ValueError: a rank is given too, or nothing fits.
    """
    if options.param_budget is None:
        return method
    method_options = _method_options(options)
    if "rank" in method_options or sets_option(options.adapter, "rank"):
        raise ValueError("--param_budget chooses the rank; leave --rank out, or set it to none")
    return fit_budget(
        model,
        options.adapter,
        targets=options.targets,
        text_encoder_targets=text_encoder_targets(options),
        budget=parse_budget(options.param_budget),
        **method_options,
    )


def budget_notices(options: TrainOptions, method: Method, model: object) -> list[str]:
    """Lines about a rank that `--param_budget` chose and that is larger than the layers; none without it."""
    if options.param_budget is None:
        return []
    return size_notices(model, method, options.targets, text_encoder_targets=text_encoder_targets(options))


def text_encoder_targets(options: TrainOptions) -> str | None:
    """The layers of the text encoders that are adapted; None: none."""
    if not options.train_text_encoder:
        return None
    return options.text_encoder_targets or "attention"


def default_learning_rate(options: TrainOptions, method: Method) -> float:
    """The rate when none is given: the optimizer's, else one tuned on this base, else the method's."""
    optimizer_rate = OPTIMIZER_DEFAULT_LR.get(options.optimizer.lower())
    if optimizer_rate is not None:
        return optimizer_rate
    return _tuned_values(options, method).get("learning_rate", method.learning_rate)


def _tuned_values(options: TrainOptions, method: Method) -> Mapping[str, float]:
    return base_profile(options).tuned_methods.get(method.name, {})


def _method_options(options: TrainOptions) -> dict[str, object]:
    """The method's fields from `--rank`, `--alpha`, `--scale` and `--adapter_options`.

    Raises:
        ValueError: a field is given twice.
    """
    named_options = {}
    for name in ("rank", "alpha", "scale"):
        value = getattr(options, name)
        if value is not None:
            named_options[name] = value
    other_options = parse_pairs(options.adapter_options, "--adapter_options")
    for name in sorted(named_options.keys() & other_options.keys()):
        other = f"--adapter_options {name}={other_options[name]}"
        raise ValueError(f"--{name} {named_options[name]} and {other} exclude each other; give one of them")
    method_options = {**named_options, **other_options}
    for name, value in method_options.items():
        if sets_option(options.adapter, name):
            raise ValueError(
                f"{name} {value} has no effect: --adapter {options.adapter!r} sets {name} itself; "
                "give one of them"
            )
    return method_options
