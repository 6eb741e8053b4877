"""Names of a U-Net's layers in the original code, which numbers blocks and the layers in them."""

from __future__ import annotations

import re
from collections.abc import Container

_IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ALL_BLOCKS = range(100)  # more than any U-Net has


def sgm_path(path: str, resnets: int, *, attended: Container[int] = ()) -> str | None:
    """The name of a layer in the original U-Net's numbering; None for a layer that it does not have.

    Args:
        path: in diffusers' UNet2DConditionModel.
        resnets: per down block of this model.
        attended: numbers of the up blocks with attention, in which the upsampling convolution is the third
            layer and not the second.

    Source: stabilityai/generative-models' U-Net, as diffusers converts its checkpoints.
    """
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", path):
        kind, number, inner = match[1], int(match[2]), match[3]
        place = 2 * number + (kind == "attentions")
        return f"middle_block.{place}.{_inside(kind, inner)}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", path)
    if match is None:
        return None
    down, block, kind, number, inner = match[1] == "down", int(match[2]), match[3], int(match[4]), match[5]
    if kind in ("resnets", "attentions"):
        place = block * (resnets + 1) + number + down
        side, slot = "input" if down else "output", int(kind == "attentions")
        return f"{side}_blocks.{place}.{slot}.{_inside(kind, inner)}"
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (resnets + 1)}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{block * (resnets + 1) + resnets}.{2 if block in attended else 1}.conv"
    return None


def _inside(kind: str, inner: str) -> str:
    return _IN_RESNET.get(inner, inner) if kind == "resnets" else inner
