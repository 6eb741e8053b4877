"""Which trained tensors have which learning rate and weight decay, as groups of an optimizer."""

from collections.abc import Iterator
from typing import TypedDict

from torch import nn

from diffadapt.adapters.adapter import Adapter
from diffadapt.common.pipeline_components import is_in_text_encoder


class RateGroup(TypedDict, total=False):
    """A parameter group of an optimizer; without ``lr`` or ``weight_decay`` it has the optimizer's."""

    params: list[nn.Parameter]
    lr: float
    weight_decay: float


def rate_groups(adapter: Adapter, text_encoder_lr: float | None = None) -> list[RateGroup]:
    """The trained tensors: first the denoiser's, then, with a rate for the text encoders, theirs.

    Tensors for which zero is not the base, as scales that start at 1, are groups without weight decay.

    Raises: ValueError for tensors that serve the denoiser and a text encoder at once.
    """
    trained = [p for p in adapter.parameters() if p.requires_grad]
    if text_encoder_lr is None:
        return _by_decay(adapter, {"params": trained})
    of_text = {id(p) for part in adapter.parts for p in _of_text_encoders(part)}
    denoiser = [p for p in trained if id(p) not in of_text]
    text = [p for p in trained if id(p) in of_text]
    return [
        *_by_decay(adapter, {"params": denoiser}),
        *_by_decay(adapter, {"params": text, "lr": text_encoder_lr}),
    ]


def _by_decay(adapter: Adapter, group: RateGroup) -> list[RateGroup]:
    """The group as it is, or as two: with the optimizer's weight decay, and without any."""
    without_decay = {id(p) for part in adapter.parts for p in part.without_decay()}
    decaying = [p for p in group["params"] if id(p) not in without_decay]
    resting = [p for p in group["params"] if id(p) in without_decay]
    groups: list[RateGroup] = [
        {**group, "params": decaying},
        {**group, "params": resting, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _of_text_encoders(part: nn.Module) -> Iterator[nn.Parameter]:
    """A part's tensors that serve layers of text encoders."""
    is_text = [is_in_text_encoder(site.name) for site in part.sites]
    if all(is_text):
        yield from part.parameters()
    elif any(is_text):
        if len(part.shared):
            raise ValueError(
                f"--text_encoder_lr: {part.label} shares its trained tensors among layers, so denoiser and "
                "text encoders cannot differ; leave it out, or take another method"
            )
        for own, text in zip(part.tensors, is_text, strict=True):
            yield from own.parameters() if text else ()
