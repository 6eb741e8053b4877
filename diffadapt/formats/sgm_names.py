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
    # blocks are counted in one row: a resnet and the attention behind it are layers 0 and 1 of one block
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", path):
        kind = match[1]
        number = int(match[2])
        place = 2 * number + (kind == "attentions")  # resnet, attention, resnet
        return f"middle_block.{place}.{_inside(kind, match[3])}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", path)
    if match is None:
        return None
    is_down = match[1] == "down"
    block = int(match[2])
    kind = match[3]
    number = int(match[4])
    first = block * (resnets + 1)  # each block has a downsampler, or one resnet more on the way up
    if kind in ("resnets", "attentions"):
        side = "input" if is_down else "output"
        place = first + number + is_down  # input block 0 is conv_in
        slot = int(kind == "attentions")
        return f"{side}_blocks.{place}.{slot}.{_inside(kind, match[5])}"
    if kind == "downsamplers":
        return f"input_blocks.{first + resnets + 1}.0.op"
    if kind == "upsamplers":
        slot = 2 if block in attended else 1
        return f"output_blocks.{first + resnets}.{slot}.conv"
    return None


def _inside(kind: str, inner: str) -> str:
    return _IN_RESNET.get(inner, inner) if kind == "resnets" else inner
