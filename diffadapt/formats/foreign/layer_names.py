"""Other tools' names for the layers of a model: flattened, prefixed, sgm block numbers, old spellings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from diffadapt.adapters.targets import layers_with_weight
from diffadapt.common.pipeline_components import is_in_text_encoder, is_text_encoder
from diffadapt.formats.sgm_names import ANY, sgm_path

Place = tuple[str, str]  # component and path of a layer

_DENOISER = {
    "dotted": ("", "unet.", "transformer.", "diffusion_model."),
    "flat": ("lora_unet_", "lycoris_", "lora_transformer_"),
}
# how names begin in the original code of FLUX and SD3, and in files of kohya's scripts for them
_ORIGINAL_TRANSFORMERS = re.compile(
    r"(?:lora_unet_|lycoris_|diffusion_model\.|transformer\.|model\.)*(?:double|single|joint)_blocks[._]\d"
)
# ends of paths -> what older files call them
_OLD_ENDS = {
    ".to_out.0": ".to_out",
    ".q_proj": ".to_q",
    ".k_proj": ".to_k",
    ".v_proj": ".to_v",
    ".out_proj": ".to_out",
}


class Names:
    """The layers of a model by every name other tools give them."""

    def __init__(self, roots: Mapping[str, nn.Module]):
        self.places: dict[str, Place] = {}
        for root, module in roots.items():
            paths = [path for path, _ in layers_with_weight(module)]
            resnets = len({path.split(".")[3] for path in paths if path.startswith("down_blocks.0.resnets.")})
            for path in paths:
                for name in _names(root, path, resnets):
                    self.places.setdefault(name, (root, path))

    def find(self, name: str) -> Place | None:
        """The place of a layer, None where the model has no such layer."""
        return self.places.get(name.replace(".processor.", ".").removesuffix(".processor"))


def remedy(missing: Iterable[str]) -> str:
    """The end of an error message about layers that a model does not have; empty where nothing is known."""
    if not any(_ORIGINAL_TRANSFORMERS.match(layer) for layer in missing):
        return ""
    return (
        "; these are names of the original code of FLUX and SD3, whose layers hold query, key and value in "
        "one, and are not read: convert the file to diffusers' names first, as diffusers' own "
        "load_lora_weights does"
    )


def current_name(layer: str) -> str:
    """A layer's name in an older file of diffusers as today's diffusers writes it."""
    name = layer.replace(".processor.", ".").removesuffix(".processor")
    in_text = is_in_text_encoder(name)
    for end, was in _OLD_ENDS.items():
        if name.endswith(was) and in_text == end.endswith("_proj"):
            return name.removesuffix(was) + end
    return name


def _names(root: str, path: str, resnets: int) -> Iterator[str]:
    """Every name of one layer."""
    encoder = _encoder_prefixes(root) if is_text_encoder(root) else None
    spellings = [path]
    if encoder is None and resnets:
        spellings += _sgm_spellings(path, resnets)
    for prefixes in (encoder or _DENOISER, *(() if root else (_encoder_prefixes("text_encoder"),))):
        for spelling in (*spellings, *_text_model(path)):
            old = [
                spelling.removesuffix(end) + was for end, was in _OLD_ENDS.items() if spelling.endswith(end)
            ]
            for form in (spelling, *old):
                yield from (prefix + form for prefix in prefixes["dotted"])
                yield from (prefix + form.replace(".", "_") for prefix in prefixes["flat"])


def _encoder_prefixes(component: str) -> dict[str, tuple[str, ...]]:
    """Prefixes of a text encoder's layers; kohya's programs number the encoders from 1: ``lora_te2_``."""
    number = component.removeprefix("text_encoder").removeprefix("_") or "1"
    flat = [f"lora_te{number}_"]
    if number == "1":
        flat.insert(0, "lora_te_")  # where the pipeline has only one
    return {"dotted": (f"{component}.", ""), "flat": tuple(flat)}


def _sgm_spellings(path: str, resnets: int) -> list[str]:
    own = {sgm_path(path, resnets, attended=attended) for attended in (ANY, ())} - {None}
    return [f"{prefix}{name}" for name in sorted(own) for prefix in ("", "diffusion_model.")]


def _text_model(path: str) -> list[str]:
    """transformers 5 dropped this level of its CLIP text models; files have it or not."""
    head = "text_model."
    return [path.removeprefix(head)] if path.startswith(head) else [head + path]
