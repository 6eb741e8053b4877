"""Keys of other tools' files: which layer a tensor belongs to, and what it is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

# how keys end -> what the tensor is; the longest end that fits counts
_LOW_RANK = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_B.bias": "up_bias",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_linear_layer.up.bias": "up_bias",
    ".alpha": "alpha",
    ".lora.alpha": "alpha",
    "_lora.alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
_NAMES = (
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("vera_lambda_b", "vera_lambda_d"),
)
_WHOLE = {".diff": "weight", ".diff_b": "bias", ".w_norm": "weight", ".b_norm": "bias"}
ROLES = {**_LOW_RANK, **_WHOLE, **{f".{name}": name for name in _NAMES}}
# in PEFT folders: trained values that replace the layer's own
REPLACED = {
    ".weight": "new_weight",
    ".bias": "new_bias",
    ".base_layer.weight": "new_weight",
    ".base_layer.bias": "new_bias",
}
# ends and starts of keys by which kinds of files are told that are not opened
_OTHER_ENDS = {
    ".oft_blocks": "OFT or BOFT",
    ".oft_diag": "OFT",
    ".oft_R.weight": "OFT",
    ".oft_r": "OFT",
    ".boft_R": "BOFT",
    ".boft_s": "BOFT",
    ".a1.weight": "GLoRA",
    ".a2.weight": "GLoRA",
    ".b1.weight": "GLoRA",
    ".b2.weight": "GLoRA",
    ".bm.weight": "GLoRA",
    ".glora_A": "GLoRA",
    ".on_input": "IA3",
    ".ia3_l": "IA3",
    "emb_params": "textual inversion",
}
_OTHER_STARTS = {
    "model.diffusion_model.": "a whole checkpoint",
    "first_stage_model.": "a whole checkpoint",
    "conditioner.embedders.": "a whole checkpoint",
    "cond_stage_model.": "a whole checkpoint",
    "lora_controlnet": "ControlNet's LoRA",
}


class Named(NamedTuple):
    """A tensor and the key it has in the file."""

    key: str
    tensor: Tensor


def by_layer(
    tensors: Mapping[str, Tensor], *, with_replaced: bool = False
) -> tuple[dict[str, dict[str, Named]], list[str]]:
    """Every layer's tensors by what they are, and the keys that fit nothing."""
    roles = ROLES | (REPLACED if with_replaced else {})
    ends = sorted(roles, key=len, reverse=True)
    layers: dict[str, dict[str, Named]] = {}
    left: list[str] = []
    for key, tensor in tensors.items():
        end = next((end for end in ends if key.endswith(end) and len(key) > len(end)), None)
        if end is None:
            left.append(key)
            continue
        layer = layers.setdefault(key.removesuffix(end), {})
        if roles[end] in layer:
            left.append(key)
        else:
            layer[roles[end]] = Named(key, tensor)
    return layers, left


def unsupported(keys: Iterable[str]) -> str:
    """What kinds of files, known but not opened, these keys belong to; empty for none."""
    kinds: dict[str, str] = {}
    for key in sorted(keys):
        by_end = (kind for end, kind in _OTHER_ENDS.items() if key.endswith(end))
        by_start = (kind for start, kind in _OTHER_STARTS.items() if key.startswith(start))
        kind = next(by_end, None) or next(by_start, None)
        if kind is not None:
            kinds.setdefault(kind, key)
    if not kinds:
        return ""
    listed = " and ".join(f"{kind} (keys such as {key})" for kind, key in kinds.items())
    return (
        f"{listed}: not supported; merge it into the base with the program that wrote it, then "
        "`diffadapt extract` makes an adapter of the difference"
    )
