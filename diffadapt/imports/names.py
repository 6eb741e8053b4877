"""Other tools' names for the layers of a model: flattened, prefixed, sgm block numbers, old spellings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import nn

from diffadapt.targets import weighted_layers

Place = tuple[str, str]  # component and path of a layer

_DENOISER = {"dotted": ("", "unet.", "transformer."), "flat": ("lora_unet_", "lycoris_", "lora_transformer_")}
_ENCODERS = {
    "text_encoder": {"dotted": ("text_encoder.", ""), "flat": ("lora_te_", "lora_te1_")},
    "text_encoder_2": {"dotted": ("text_encoder_2.", ""), "flat": ("lora_te2_",)},
    "text_encoder_3": {"dotted": ("text_encoder_3.", ""), "flat": ("lora_te3_",)},
}
# ends of paths -> what older files call them
_OLD_ENDS = {
    ".to_out.0": ".to_out",
    ".q_proj": ".to_q",
    ".k_proj": ".to_k",
    ".v_proj": ".to_v",
    ".out_proj": ".to_out",
}
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


class Names:
    """The layers of a model by every name other tools give them."""

    def __init__(self, roots: Mapping[str, nn.Module]):
        self.places: dict[str, Place] = {}
        for root, module in roots.items():
            paths = [path for path, _ in weighted_layers(module)]
            resnets = len({path.split(".")[3] for path in paths if path.startswith("down_blocks.0.resnets.")})
            for path in paths:
                for name in _names(root, path, resnets):
                    self.places.setdefault(name, (root, path))

    def find(self, name: str) -> Place | None:
        """The place of a layer, None where the model has no such layer."""
        return self.places.get(name.replace(".processor.", ".").removesuffix(".processor"))


def sgm_path(path: str, resnets: int) -> str | None:
    """The name of a layer in the original U-Net's numbering; ``resnets`` per down block of this model.

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
    return None


def _inside(kind: str, inner: str) -> str:
    return _IN_RESNET.get(inner, inner) if kind == "resnets" else inner


def _names(root: str, path: str, resnets: int) -> Iterator[str]:
    """Every name of one layer."""
    encoder = _ENCODERS.get(root)
    spellings = [path]
    if encoder is None and resnets:
        spellings += _sgm_spellings(path, resnets)
    for prefixes in (encoder or _DENOISER, *(() if root else (_ENCODERS["text_encoder"],))):
        for spelling in (*spellings, *_text_model(path)):
            old = [
                spelling.removesuffix(end) + was for end, was in _OLD_ENDS.items() if spelling.endswith(end)
            ]
            for form in (spelling, *old):
                yield from (prefix + form for prefix in prefixes["dotted"])
                yield from (prefix + form.replace(".", "_") for prefix in prefixes["flat"])


def _sgm_spellings(path: str, resnets: int) -> list[str]:
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", path):
        place = int(match[1]) * (resnets + 1) + resnets
        return [f"output_blocks.{place}.{slot}.conv" for slot in (1, 2)]  # 2 behind an attention
    own = sgm_path(path, resnets)
    return [] if own is None else [own, f"diffusion_model.{own}"]


def _text_model(path: str) -> list[str]:
    """transformers 5 dropped this level of its CLIP text models; files have it or not."""
    head = "text_model."
    return [path.removeprefix(head)] if path.startswith(head) else [head + path]
