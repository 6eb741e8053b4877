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

PACKAGED_OPTIMIZERS = {  # those that are not torch's: (module, class, package to install)
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit", "bitsandbytes"),
    "prodigy": ("prodigyopt", "Prodigy", "prodigyopt"),
}
UNSUPPORTED = {"LBFGS": "needs the loss again within a step", "SparseAdam": "takes sparse gradients only"}
ADAM_CLASSES = ("AdamW", "AdamW8bit", "Prodigy")  # take the options below
ADAM_OPTIONS = ("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon")


def make_optimizer(
    parameters: Sequence[nn.Parameter] | Sequence[RateGroup], options: TrainOptions
) -> torch.optim.Optimizer:
    """Builds the optimizer of `--optimizer` with `--optimizer_options`.

    Args:
        parameters: tensors, or groups of them; a group without a learning rate has that of the run.

    Raises:
        ValueError: the name is unknown, a package is not installed, or it does not take the arguments.
    """
    optimizer_class = _find_class(options.optimizer)
    arguments: dict[str, object] = {"lr": options.learning_rate}
    if optimizer_class.__name__ in ADAM_CLASSES:
        arguments["betas"] = (options.adam_beta1, options.adam_beta2)
        arguments["weight_decay"] = options.adam_weight_decay
        arguments["eps"] = options.adam_epsilon
    else:
        _refuse_adam_options(optimizer_class.__name__, options)
    arguments |= parse_pairs(options.optimizer_options, "--optimizer_options")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Prodigy prints its settings
            return optimizer_class(parameters, **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--optimizer {options.optimizer} with {arguments}: {error}") from error


def state_values(options: TrainOptions) -> float:
    """Values of 4 bytes that the optimizer keeps per trained value: 2 unless it is known to differ."""
    # Adam keeps two moments, adamw8bit in 8 bits each; SGD one; Prodigy adds the start and a sum of gradients
    return {"adamw8bit": 0.5, "prodigy": 4.0, "sgd": 1.0}.get(options.optimizer.lower(), 2.0)


def _find_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of a name, whatever its case."""
    if name.lower() in PACKAGED_OPTIMIZERS:
        module_name, class_name, package = PACKAGED_OPTIMIZERS[name.lower()]
        return getattr(_import(module_name, package, name), class_name)
    torch_optimizers = {}
    for value in vars(torch.optim).values():
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer):
            torch_optimizers[value.__name__.lower()] = value
    del torch_optimizers["optimizer"]  # the base class
    if name.lower() not in torch_optimizers:
        names = [*PACKAGED_OPTIMIZERS, *torch_optimizers]
        raise ValueError(f"unknown optimizer {name!r}{did_you_mean(name.lower(), names)}")
    optimizer_class = torch_optimizers[name.lower()]
    class_name = optimizer_class.__name__
    if class_name in UNSUPPORTED:
        raise ValueError(f"--optimizer {class_name} {UNSUPPORTED[class_name]}; take another, as adamw")
    return optimizer_class


def _import(module_name: str, package: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ImportError:
        raise ValueError(f"--optimizer {name} needs a package: pip install {package}") from None


def _refuse_adam_options(optimizer_name: str, options: TrainOptions) -> None:
    """An option that would have no effect is an error."""
    unused = []
    for name in ADAM_OPTIONS:
        default = TrainOptions.__dataclass_fields__[name].default
        if getattr(options, name) != default:
            unused.append(f"--{name}")
    if unused:
        raise ValueError(
            f"{', '.join(unused)}: not for --optimizer {optimizer_name}; use --optimizer_options, as "
            "weight_decay=0.01"
        )
