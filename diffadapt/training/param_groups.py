"""Parameter groups of the optimizer: learning rate and weight decay of each trained tensor."""

from typing import TypedDict

from torch import nn

from diffadapt.adapters.adapter import Adapter
from diffadapt.common.pipeline_components import is_in_text_encoder


class RateGroup(TypedDict, total=False):
    """A parameter group of an optimizer; without `lr` or `weight_decay` it has the optimizer's."""

    params: list[nn.Parameter]
    lr: float
    weight_decay: float


def rate_groups(adapter: Adapter, text_encoder_lr: float | None = None) -> list[RateGroup]:
    """Groups the trained tensors: first the denoiser's, then, with a rate for the text encoders, theirs.

    Tensors for which zero is not the base, as scales that start at 1, are groups without weight decay.

    Raises:
        ValueError: tensors serve the denoiser and a text encoder at once.
    """
    trained = [p for p in adapter.parameters() if p.requires_grad]
    if text_encoder_lr is None:
        return _split_by_decay(adapter, {"params": trained})
    # By id: comparing tensors compares their values.
    text_ids = set()
    for part in adapter.parts:
        text_ids.update(map(id, _text_encoder_parameters(part)))
    denoiser_group: RateGroup = {"params": []}
    text_group: RateGroup = {"params": [], "lr": text_encoder_lr}
    for parameter in trained:
        group = text_group if id(parameter) in text_ids else denoiser_group
        group["params"].append(parameter)
    return _split_by_decay(adapter, denoiser_group) + _split_by_decay(adapter, text_group)


def _split_by_decay(adapter: Adapter, group: RateGroup) -> list[RateGroup]:
    """One or two groups: the tensors with the optimizer's weight decay, and those without any."""
    undecayed_ids = set()
    for part in adapter.parts:
        undecayed_ids.update(map(id, part.without_decay()))
    decayed: RateGroup = {**group, "params": []}
    undecayed: RateGroup = {**group, "params": [], "weight_decay": 0.0}
    for parameter in group["params"]:
        target = undecayed if id(parameter) in undecayed_ids else decayed
        target["params"].append(parameter)
    return [group for group in (decayed, undecayed) if group["params"]]


def _text_encoder_parameters(part: nn.Module) -> list[nn.Parameter]:
    """The tensors of a method's state that serve layers of text encoders."""
    is_text = [is_in_text_encoder(site.name) for site in part.sites]
    if not any(is_text):
        return []
    if all(is_text):
        return list(part.parameters())
    # A tensor that is shared among all layers belongs to both groups.
    if len(part.shared):
        raise ValueError(
            f"--text_encoder_lr: {part.label} shares its trained tensors among layers, so denoiser and "
            "text encoders cannot differ; leave it out, or take another method"
        )
    parameters: list[nn.Parameter] = []
    for layer_tensors, is_text_layer in zip(part.tensors, is_text, strict=True):
        if is_text_layer:
            parameters += layer_tensors.parameters()
    return parameters
