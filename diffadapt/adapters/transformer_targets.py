"""Layers of transformer denoisers, by the class of the denoiser: what presets choose, and what nothing reads.

Presets are globs on the names of layers inside the denoiser. They name the blocks, so that a layer elsewhere
with a usual name (Chroma's `distilled_guidance_layer.out_proj`) is not chosen by accident.

A denoiser with two streams reads the image stream alone after its last block. What that block computes for
the text alone, also as queries, would never get a gradient; the tests measure which layers these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class TransformerTargets:
    """Facts about the layers of one class of denoisers.

    Attributes:
        name: of the architecture, in messages.
        attention: projections of attention: query, key, value, output, and gates of the output.
        query_value: those for queries and values, fused ones included.
        mlp: layers of the feed-forward networks, also where they are fused with those of attention.
        last_block_unread: names below the last of `transformer_blocks` that no output depends on.
    """

    name: str
    attention: tuple[str, ...]
    query_value: tuple[str, ...]
    mlp: tuple[str, ...]
    last_block_unread: tuple[str, ...] = ()


def _below(parents: Sequence[str], leaves: Sequence[str]) -> tuple[str, ...]:
    """Every leaf below every parent, as globs."""
    globs = []
    for parent in parents:
        for leaf in leaves:
            globs.append(f"{parent}.{leaf}")
    return tuple(globs)


# names in diffusers' joint attention, whose image and text streams have their own projections
_IMAGE_STREAM = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT_STREAM = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_JOINT_QUERY_VALUE = ("to_q", "to_v", "add_q_proj", "add_v_proj")
_MLP = ("net.0.proj", "net.2")
_DOUBLE = "transformer_blocks.*"
_SINGLE = "single_transformer_blocks.*"

_SD3 = TransformerTargets(
    "sd3",
    # attn2 over the image alone is in the first blocks of SD3.5-medium
    attention=_below([f"{_DOUBLE}.attn"], _IMAGE_STREAM + _TEXT_STREAM)
    + _below([f"{_DOUBLE}.attn2"], _IMAGE_STREAM),
    query_value=_below([f"{_DOUBLE}.attn"], _JOINT_QUERY_VALUE)
    + _below([f"{_DOUBLE}.attn2"], ("to_q", "to_v")),
    mlp=_below([f"{_DOUBLE}.ff", f"{_DOUBLE}.ff_context"], _MLP),
    last_block_unread=("attn.add_q_proj", "attn.norm_added_q"),
)
# The output of single blocks, `proj_out`, is that of attention and of the network in one: as in diffusers'
# example it does not count as attention.
_FLUX = TransformerTargets(
    "flux",
    attention=_below([f"{_DOUBLE}.attn"], _IMAGE_STREAM + _TEXT_STREAM)
    + _below([f"{_SINGLE}.attn"], ("to_q", "to_k", "to_v")),
    query_value=_below([f"{_DOUBLE}.attn"], _JOINT_QUERY_VALUE)
    + _below([f"{_SINGLE}.attn"], ("to_q", "to_v")),
    mlp=_below([f"{_DOUBLE}.ff", f"{_DOUBLE}.ff_context"], _MLP)
    + _below([_SINGLE], ("proj_mlp", "proj_out")),
)
_CHROMA = replace(_FLUX, name="chroma")  # FLUX.1 whose modulations come from one small network
# single blocks project attention and the feed-forward network in one layer, so both presets choose it
_FLUX2_FUSED = _below([f"{_SINGLE}.attn"], ("to_qkv_mlp_proj", "to_out"))
_FLUX2 = TransformerTargets(
    "flux2",
    attention=_below([f"{_DOUBLE}.attn"], _IMAGE_STREAM + _TEXT_STREAM) + _FLUX2_FUSED,
    query_value=(*_below([f"{_DOUBLE}.attn"], _JOINT_QUERY_VALUE), f"{_SINGLE}.attn.to_qkv_mlp_proj"),
    mlp=_below([f"{_DOUBLE}.ff", f"{_DOUBLE}.ff_context"], ("linear_in", "linear_out")) + _FLUX2_FUSED,
)
_QWEN_IMAGE = TransformerTargets(
    "qwen_image",
    attention=_below([f"{_DOUBLE}.attn"], _IMAGE_STREAM + _TEXT_STREAM),
    query_value=_below([f"{_DOUBLE}.attn"], _JOINT_QUERY_VALUE),
    mlp=_below([f"{_DOUBLE}.img_mlp", f"{_DOUBLE}.txt_mlp"], _MLP),
    last_block_unread=(
        "attn.add_q_proj",
        "attn.norm_added_q",
        "attn.to_add_out",
        "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
    ),
)
# one stream of image and text together, after a few blocks for each of them alone
_Z_IMAGE_BLOCKS = ("layers.*", "noise_refiner.*", "context_refiner.*")
_Z_IMAGE_ATTENTION = [f"{blocks}.attention" for blocks in _Z_IMAGE_BLOCKS]
_Z_IMAGE_MLP = [f"{blocks}.feed_forward" for blocks in _Z_IMAGE_BLOCKS]
_Z_IMAGE = TransformerTargets(
    "z_image",
    attention=_below(_Z_IMAGE_ATTENTION, _IMAGE_STREAM),
    query_value=_below(_Z_IMAGE_ATTENTION, ("to_q", "to_v")),
    mlp=_below(_Z_IMAGE_MLP, ("w1", "w2", "w3")),
)
# the denoiser's own blocks, and those that combine the layers of its text encoder
_KREA2_BLOCKS = ("transformer_blocks.*", "text_fusion.layerwise_blocks.*", "text_fusion.refiner_blocks.*")
_KREA2_ATTENTION = [f"{blocks}.attn" for blocks in _KREA2_BLOCKS]
_KREA2_MLP = [f"{blocks}.ff" for blocks in _KREA2_BLOCKS]
_KREA2 = TransformerTargets(
    "krea2",
    attention=_below(_KREA2_ATTENTION, (*_IMAGE_STREAM, "to_gate")),
    query_value=_below(_KREA2_ATTENTION, ("to_q", "to_v")),
    mlp=_below(_KREA2_MLP, ("gate", "up", "down")),
)
# attn1 is over the image, attn2 from the image to the text
_PIXART = TransformerTargets(
    "pixart_sigma",
    attention=_below([f"{_DOUBLE}.attn1", f"{_DOUBLE}.attn2"], _IMAGE_STREAM),
    query_value=_below([f"{_DOUBLE}.attn1", f"{_DOUBLE}.attn2"], ("to_q", "to_v")),
    mlp=_below([f"{_DOUBLE}.ff"], _MLP),
)

# class of the denoiser -> its layers
TRANSFORMERS: dict[str, TransformerTargets] = {
    "SD3Transformer2DModel": _SD3,
    "FluxTransformer2DModel": _FLUX,
    "Flux2Transformer2DModel": _FLUX2,
    "QwenImageTransformer2DModel": _QWEN_IMAGE,
    "ZImageTransformer2DModel": _Z_IMAGE,
    "Krea2Transformer2DModel": _KREA2,
    "ChromaTransformer2DModel": _CHROMA,
    "PixArtTransformer2DModel": _PIXART,
}
