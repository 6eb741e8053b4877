"""Names of layers in kohya's files, and which of them each program finds in its own copy of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.attach import pipeline_of
from diffadapt.formats.export.changes import Change
from diffadapt.formats.sgm_names import sgm_path

PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}

# Layers of UNet2DConditionModel that have a counterpart in the UNet of the first Stable Diffusion's code:
# ComfyUI 0.3.77, comfy/utils.py: unet_to_diffusers and its maps UNET_MAP_*.
_BLOCK = r"(?:(?:down|up)_blocks\.\d+|mid_block)"
_UNET_LAYERS = re.compile(
    r"conv_in|conv_out|conv_norm_out|(?:time|add)_embedding\.linear_[12]"
    rf"|{_BLOCK}\.resnets\.\d+\.(?:norm1|norm2|conv1|conv2|time_emb_proj|conv_shortcut)"
    rf"|{_BLOCK}\.attentions\.\d+\.(?:norm|proj_in|proj_out)"
    rf"|{_BLOCK}\.attentions\.\d+\.transformer_blocks\.\d+\.(?:norm[123]|ff\.net\.0\.proj|ff\.net\.2"
    r"|attn[12]\.(?:to_q|to_k|to_v|to_out\.0))"
    r"|down_blocks\.\d+\.downsamplers\.0\.conv|up_blocks\.\d+\.upsamplers\.0\.conv"
)
_TEXT_PROJECTIONS = re.compile(
    r"text_model\.encoder\.layers\.\d+\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])"
)
_TEXT_LAYERS = re.compile(r"text_model\.encoder\.layers\.\d+\.[\w.]+")
_SGM_BLOCKS = ("input_blocks", "middle_block", "output_blocks")
# stable-diffusion-webui 1.10.1, networks.py: convert_diffusers_name_to_compvis has no rule for these
_UNKNOWN_TO_A1111 = re.compile(r"conv_norm_out|add_embedding\.\w+")


@dataclass(frozen=True)
class Base:
    """What kind of model the adapter belongs to.

    Attributes:
        family: ``sd1``, ``sd2``, ``sdxl``, or ``other`` for what no other program knows.
        sizes: whether the sizes, too, are those of a published model of the family.
        prediction: ``epsilon`` or ``v_prediction``, None where unknown.
        resnets: of every down block of the UNet.
        attended: numbers of its up blocks with attention.
    """

    family: str
    sizes: bool = True
    prediction: str | None = None
    resnets: int = 2
    attended: frozenset[int] = frozenset()

    @property
    def is_sdxl(self) -> bool:
        return self.family == "sdxl"


def base_of(adapter: Adapter) -> Base:
    """The family by the structure of the UNet; of a lone text encoder, by that of its pipeline."""
    from diffusers import UNet2DConditionModel  # takes seconds, which `import diffadapt` need not

    pipeline = pipeline_of(adapter)
    unet = adapter.roots.get("unet") or getattr(pipeline, "unet", None) or adapter.roots.get("")
    if not isinstance(unet, UNet2DConditionModel):
        return Base("other")
    config: Mapping = unet.config
    width = config["cross_attention_dim"]
    scheduler = getattr(pipeline, "scheduler", None)
    prediction = None if scheduler is None else scheduler.config.get("prediction_type")
    if config.get("addition_embed_type") == "text_time":
        attended = frozenset(i for i, kind in enumerate(config["up_block_types"]) if "Attn" in kind)
        return Base("sdxl", width == 2048, prediction, config["layers_per_block"], attended)
    return Base("sd2" if width == 1024 else "sd1", width in (768, 1024), prediction)


def kohya_name(component: str, path: str, base: Base) -> str:
    """``lora_unet_...``, ``lora_te_...``; with two text encoders ``lora_te1_...`` and ``lora_te2_...``.

    As in kohya's own files, layers of SDXL's UNet have the names of the original code, the others diffusers'.
    Raises: ValueError for a model that has no name there.
    """
    if component not in PREFIXES or base.family == "other":
        model = component or "this model"
        raise ValueError(
            f"kohya's file format has no name for layers of {model}: it knows the UNet and the CLIP text "
            "encoders of Stable Diffusion 1, 2 and XL; use --to merged"
        )
    if component == "unet" and base.is_sdxl:
        path = sgm_path(path, base.resnets, attended=base.attended) or path
    prefix = "lora_te1_" if component == "text_encoder" and base.is_sdxl else PREFIXES[component]
    return prefix + clip_path(component, path).replace(".", "_")


def clip_path(component: str, path: str) -> str:
    """The path in a CLIP text encoder with the level that transformers 5 no longer has, as files name it."""
    lacks = component.startswith("text_encoder") and not path.startswith(("text_model.", "text_projection"))
    return f"text_model.{path}" if lacks else path


def found_by_comfyui(change: Change) -> bool:
    """Whether ComfyUI's tables (comfy/lora.py, 0.3.77) list the layer."""
    path = clip_path(change.component, change.path)
    if change.component == "unet":
        return _UNET_LAYERS.fullmatch(path) is not None
    return _TEXT_PROJECTIONS.fullmatch(path) is not None


def found_by_sd_scripts(change: Change, base: Base) -> bool:
    """Whether kohya's sd-scripts (48d368f) make a LoRA of the layer: in SDXL inside the blocks alone."""
    if change.component != "unet" or not base.is_sdxl:
        return True
    name = sgm_path(change.path, base.resnets) or ""
    return name.partition(".")[0] in _SGM_BLOCKS and name != "input_blocks.0.0"


def found_by_a1111(change: Change, base: Base) -> bool:
    """Whether stable-diffusion-webui 1.10.1 finds the layer under the name it has in the file."""
    path = clip_path(change.component, change.path)
    if change.component != "unet":
        known = _TEXT_LAYERS if change.component == "text_encoder" else _TEXT_PROJECTIONS
        return known.fullmatch(path) is not None
    if base.is_sdxl:
        return sgm_path(path, base.resnets) is not None  # it has the file's own names
    return _UNET_LAYERS.fullmatch(path) is not None and _UNKNOWN_TO_A1111.fullmatch(path) is None
