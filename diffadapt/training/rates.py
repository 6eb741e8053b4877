"""Which trained tensors have which learning rate: those of the text encoders can have their own."""

from collections.abc import Iterator
from typing import TypedDict

from torch import nn

from diffadapt.adapter import Adapter


class RateGroup(TypedDict, total=False):
    """A parameter group of an optimizer; without ``lr`` it has the optimizer's."""

    params: list[nn.Parameter]
    lr: float


def rate_groups(adapter: Adapter, text_encoder_lr: float | None = None) -> list[RateGroup]:
    """The trained tensors in one group; with a rate for the text encoders, theirs in a second one.

    Raises: ValueError for tensors that serve the denoiser and a text encoder at once.
    """
    trained = [p for p in adapter.parameters() if p.requires_grad]
    if text_encoder_lr is None:
        return [{"params": trained}]
    of_text = {id(p) for part in adapter.parts for p in _of_text_encoders(part)}
    return [
        {"params": [p for p in trained if id(p) not in of_text]},
        {"params": [p for p in trained if id(p) in of_text], "lr": text_encoder_lr},
    ]


def _of_text_encoders(part: nn.Module) -> Iterator[nn.Parameter]:
    """A part's tensors that serve layers of text encoders."""
    is_text = [site.name.startswith("text_encoder") for site in part.sites]
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
