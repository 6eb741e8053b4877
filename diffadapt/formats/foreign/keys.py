"""Keys of other tools' files: which layer a tensor belongs to, and what it is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

# ends of keys -> role of the tensor; the longest end that matches counts
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
# ends that are the name of the role
_SAME_NAMES = (
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("vera_lambda_b", "vera_lambda_d"),
)
_DIFFERENCES = {".diff": "weight", ".diff_b": "bias", ".w_norm": "weight", ".b_norm": "bias"}
ROLES = {**_LOW_RANK, **_DIFFERENCES, **{f".{name}": name for name in _SAME_NAMES}}
# in PEFT folders: trained values that replace the layer's own
REPLACEMENTS = {
    ".weight": "new_weight",
    ".bias": "new_bias",
    ".base_layer.weight": "new_weight",
    ".base_layer.bias": "new_bias",
}
# ends and starts of keys by which kinds of files are recognised that are not supported
UNSUPPORTED_ENDS = {
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
UNSUPPORTED_STARTS = {
    "model.diffusion_model.": "a whole checkpoint",
    "first_stage_model.": "a whole checkpoint",
    "conditioner.embedders.": "a whole checkpoint",
    "cond_stage_model.": "a whole checkpoint",
    "lora_controlnet": "ControlNet's LoRA",
}


EXPORTED_BY_US = "diffadapt.method"  # a key in the header of our own exports


class KeyedTensor(NamedTuple):
    """A tensor and its key in the file."""

    key: str
    tensor: Tensor


def tensors_by_layer(
    tensors: Mapping[str, Tensor], *, with_replacements: bool = False
) -> tuple[dict[str, dict[str, KeyedTensor]], list[str]]:
    """Every layer's tensors by their roles, and the keys that have none.

    Args:
        with_replacements: whether `.weight` and `.bias` are values in the place of the layer's own.
    """
    roles = ROLES | (REPLACEMENTS if with_replacements else {})
    ends = sorted(roles, key=len, reverse=True)
    layers: dict[str, dict[str, KeyedTensor]] = {}
    unknown_keys: list[str] = []
    for key, tensor in tensors.items():
        # the longest first: `.lora_B.bias` ends in `.bias` too
        end = next((end for end in ends if key.endswith(end) and len(key) > len(end)), None)
        if end is None:
            unknown_keys.append(key)
            continue
        layer = layers.setdefault(key.removesuffix(end), {})
        if roles[end] in layer:  # two spellings of one tensor
            unknown_keys.append(key)
        else:
            layer[roles[end]] = KeyedTensor(key, tensor)
    return layers, unknown_keys


def name_magnitude(by_role: dict[str, KeyedTensor], header: Mapping[str, str]) -> None:
    """Gives the `dora_scale` of our own exports, which is ComfyUI's, another role than LyCORIS' has.

    ComfyUI divides by the norm of the base weight, LyCORIS by that of the changed one. Beside PEFT's
    magnitude, which diffusers reads, it says the same once more.
    """
    if EXPORTED_BY_US not in header or "dora_scale" not in by_role:
        return
    scale = by_role.pop("dora_scale")
    if "magnitude" not in by_role:
        by_role["base_magnitude"] = scale


def check_supported(keys: Iterable[str], path: object) -> None:
    """Raises ValueError for keys by which a kind of file is recognised that is not supported."""
    kinds: dict[str, str] = {}  # -> an example of its keys
    for key in sorted(keys):
        kind = _unsupported_kind(key)
        if kind is not None:
            kinds.setdefault(kind, key)
    if kinds:
        listed = " and ".join(f"{kind} (keys such as {key})" for kind, key in kinds.items())
        raise ValueError(
            f"{path} holds {listed}: not supported; merge it into the base with the program that wrote it, "
            "then `diffadapt extract` makes an adapter of the difference"
        )


def _unsupported_kind(key: str) -> str | None:
    for end, kind in UNSUPPORTED_ENDS.items():
        if key.endswith(end):
            return kind
    for start, kind in UNSUPPORTED_STARTS.items():
        if key.startswith(start):
            return kind
    return None
