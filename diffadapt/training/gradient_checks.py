"""Checks that stop a run which could only waste time, with what is wrong and what to do."""

import math
from collections.abc import Sequence

import torch

from diffadapt.adapters.adapter import Adapter
from diffadapt.common.messages import shorten_list


def check_precision(adapter: Adapter) -> None:
    """Checks that trained tensors are float32 or more: below that, small updates would round to nothing.

    Raises:
        TypeError: a tensor has a lower precision; the message names them.
    """
    parameters = _trained_parameters(adapter)
    low_precision = []
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            low_precision.append(name)
    if low_precision:
        dtype = parameters[low_precision[0]].dtype
        raise TypeError(
            f"{len(low_precision)} trained tensors are {dtype} and would lose small updates: "
            f"{shorten_list(low_precision)}; keep them in float32 and use --mixed_precision for the "
            "activations"
        )


class GradientFlowCheck:
    """Finds trained tensors that no gradient reaches in the first steps of a run.

    Factors that start at zero hide the gradient of others until they moved, so what counts is the first
    step after one that was made with a rate above zero.

    Attributes:
        is_done: whether that step is over.
    """

    def __init__(self, adapter: Adapter):
        self._parameters = _trained_parameters(adapter)
        self._without_gradient = set(self._parameters)
        self._has_moved = False
        self.is_done = False

    def check(self, rate: float) -> None:
        """Looks at the gradients before an optimizer step.

        Args:
            rate: learning rate of the step.

        Raises:
            ValueError: tensors got no gradient in two such steps; the message names their layers.
        """
        # e.g. LoRA's `up` starts at zero, so the first step has no gradient for `down`
        for name in list(self._without_gradient):
            gradient = self._parameters[name].grad
            if gradient is not None and gradient.any():
                self._without_gradient.discard(name)
        if self._has_moved and self._without_gradient:
            names = shorten_list(sorted(self._without_gradient))
            count = len(self._without_gradient)
            raise ValueError(
                f"no gradient reaches {count} of {len(self._parameters)} trained tensors in two steps: "
                f"{names}; leave these layers out of --targets (as A+!GLOB), or report it when "
                "they should learn"
            )
        self.is_done = self._has_moved
        self._has_moved = self._has_moved or rate > 0


def nonfinite_message(
    *, step: int, losses: Sequence[float], norm: float, names: Sequence[Sequence[str]], tolerated: int
) -> str:
    """The message about a step whose loss or gradient is not finite.

    Args:
        losses: of the microsteps.
        norm: of the gradient.
        names: file names of the images of each microstep.
        tolerated: `--skip_nonfinite`.
    """
    suspects = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
    if suspects:
        problem = f"the loss is {losses[suspects[0]]}"
    else:
        # the gradient is the sum over all microsteps, so it could be any of them
        problem = f"the loss is finite but the norm of its gradient is {norm}"
        suspects = list(range(len(losses)))
    files: list[str] = []
    for index in suspects:
        files += names[index]
    unique_files = dict.fromkeys(files)  # in their order
    return (
        f"step {step}: {problem}, with the images {', '.join(unique_files)}; lower --learning_rate, "
        "use --mixed_precision no or bf16, look at these images, or leave such steps out with "
        f"--skip_nonfinite N (now {tolerated})"
    )


def _trained_parameters(adapter: Adapter) -> dict[str, torch.nn.Parameter]:
    """Trained tensors by the names they have in the adapter's file: part/layer/factor."""
    parameters = {}
    for part in adapter.parts:
        for name, tensor in part.named_tensors().items():
            if tensor.requires_grad:
                parameters[name] = tensor
    return parameters
