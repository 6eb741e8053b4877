"""Checks that stop a run which could only waste time: they name what is wrong and what to do."""

import math
from collections.abc import Sequence

import torch

from diffadapt.adapters.adapter import Adapter
from diffadapt.common.messages import shorten_list


def check_precision(adapter: Adapter) -> None:
    """Raises TypeError for trained tensors below float32: their small updates would round to nothing."""
    wrong = [name for name, p in _trained(adapter).items() if p.dtype not in (torch.float32, torch.float64)]
    if wrong:
        kind = _trained(adapter)[wrong[0]].dtype
        raise TypeError(
            f"{len(wrong)} trained tensors are {kind} and would lose small updates: {shorten_list(wrong)}; "
            "keep them in float32 and use --mixed_precision for the activations"
        )


class GradientFlowCheck:
    """Finds trained tensors that no gradient reaches in the first steps of a run.

    Factors that start at zero hide the gradient of others until they moved, so what counts is the first
    step after one that was made with a rate above zero.
    """

    def __init__(self, adapter: Adapter):
        self._parameters = _trained(adapter)
        self._silent = set(self._parameters)
        self._moved = False
        self.is_done = False

    def look(self, rate: float) -> None:
        """Before an optimizer step at this rate.

        Raises: ValueError naming the layers of the tensors that got no gradient in two such steps.
        """
        for name in list(self._silent):
            grad = self._parameters[name].grad
            if grad is not None and grad.any():
                self._silent.discard(name)
        if self._moved and self._silent:
            raise ValueError(
                f"no gradient reaches {len(self._silent)} of {len(self._parameters)} trained tensors in two "
                f"steps: {shorten_list(sorted(self._silent))}; leave these layers out of --targets "
                "(as A+!GLOB), or report it when they should learn"
            )
        self.is_done = self._moved
        self._moved = self._moved or rate > 0


def nonfinite_message(
    *, step: int, losses: Sequence[float], norm: float, names: Sequence[Sequence[str]], tolerated: int
) -> str:
    """What to say of a step whose loss or gradient is not finite.

    Args:
        losses: of the microsteps.
        norm: of the gradient.
        names: file names of the pictures of each microstep.
        tolerated: `--skip_nonfinite`.
    """
    bad = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
    what = (
        f"the loss is {losses[bad[0]]}"
        if bad
        else f"the loss is finite but the norm of its gradient is {norm}"
    )
    files = [name for index in (bad or range(len(losses))) for name in names[index]]
    return (
        f"step {step}: {what}, with the pictures {', '.join(dict.fromkeys(files))}; lower --learning_rate, "
        "use --mixed_precision no or bf16, look at these pictures, or leave such steps out with "
        f"--skip_nonfinite N (now {tolerated})"
    )


def _trained(adapter: Adapter) -> dict[str, torch.nn.Parameter]:
    """Trained tensors by the names they have in the adapter's file: part/layer/factor."""
    named = {key: tensor for part in adapter.parts for key, tensor in part.named_tensors().items()}
    return {key: tensor for key, tensor in named.items() if tensor.requires_grad}
