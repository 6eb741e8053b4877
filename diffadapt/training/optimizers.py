"""Optimizers by name: AdamW, its 8-bit form, Prodigy, and every class of torch.optim."""

import contextlib
import importlib
import io
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import nn

from diffadapt.common.messages import did_you_mean
from diffadapt.training.options import TrainOptions
from diffadapt.training.param_groups import RateGroup
from diffadapt.training.parsing import parse_pairs

# Those that are not torch's: (module, class, package to install)
OTHERS = {
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit", "bitsandbytes"),
    "prodigy": ("prodigyopt", "Prodigy", "prodigyopt"),
}
UNFIT = {"LBFGS": "needs the loss again within a step", "SparseAdam": "takes sparse gradients only"}
ADAM_OPTIONS = ("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon")


def make_optimizer(
    parameters: Sequence[nn.Parameter] | Sequence[RateGroup], options: TrainOptions
) -> torch.optim.Optimizer:
    """The optimizer of `--optimizer` with `--optimizer_options`; a group without a rate has the run's own.

    Raises: ValueError for an unknown name, a package that is not installed, or arguments it does not take.
    """
    kind = _find(options.optimizer)
    arguments: dict[str, object] = {"lr": options.learning_rate}
    if kind.__name__ in ("AdamW", "AdamW8bit", "Prodigy"):
        arguments |= {
            "betas": (options.adam_beta1, options.adam_beta2),
            "weight_decay": options.adam_weight_decay,
            "eps": options.adam_epsilon,
        }
    else:
        _refuse_adam_options(kind.__name__, options)
    arguments |= parse_pairs(options.optimizer_options, "--optimizer_options")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Prodigy prints its settings
            return kind(parameters, **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--optimizer {options.optimizer} with {arguments}: {error}") from error


def state_values(options: TrainOptions) -> float:
    """Values of 4 bytes that the optimizer keeps per trained value: 2 unless it is known to differ."""
    return {"adamw8bit": 0.5, "prodigy": 4.0, "sgd": 1.0}.get(options.optimizer.lower(), 2.0)


def _find(name: str) -> type[torch.optim.Optimizer]:
    if name.lower() in OTHERS:
        module, kind, package = OTHERS[name.lower()]
        return getattr(_import(module, package, name), kind)
    classes = [kind for kind in vars(torch.optim).values() if isinstance(kind, type)]
    known = {kind.__name__: kind for kind in classes if issubclass(kind, torch.optim.Optimizer)}
    del known["Optimizer"]  # the base class
    by_lower = {own.lower(): own for own in known}
    if name.lower() not in by_lower:
        raise ValueError(f"unknown optimizer {name!r}{did_you_mean(name.lower(), [*OTHERS, *by_lower])}")
    own = by_lower[name.lower()]
    if own in UNFIT:
        raise ValueError(f"--optimizer {own} {UNFIT[own]}; take another, as adamw")
    return known[own]


def _import(module: str, package: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"--optimizer {name} needs a package: pip install {package}") from None


def _refuse_adam_options(name: str, options: TrainOptions) -> None:
    """An option that would have no effect is an error."""
    defaults = {field: TrainOptions.__dataclass_fields__[field].default for field in ADAM_OPTIONS}
    given = [f"--{field}" for field, default in defaults.items() if getattr(options, field) != default]
    if given:
        raise ValueError(
            f"{', '.join(given)}: not for --optimizer {name}; use --optimizer_options, as weight_decay=0.01"
        )
