"""Names of a transformer's layers in the code it was published with, which often holds several in one weight.

Files of kohya's scripts, of musubi-tuner and of ai-toolkit use these names, and ComfyUI's models have them.
Sources: how diffusers 0.42.1 converts original checkpoints (loaders/single_file_utils.py) and how ComfyUI
09708ea reads names of diffusers (comfy/utils.py).
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from diffadapt.adapters.architectures import OriginalLayer


@dataclass(frozen=True)
class Blocks:
    """A list of equal blocks.

    Attributes:
        name: in the original code.
        layers: path in a block of diffusers -> in a block of the original code.
        fused: path in a block of the original code -> the layers of diffusers that its weight holds, from the
            first row on, each with its number of rows in units of the transformer's width.
    """

    name: str
    layers: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class TransformerNames:
    """Names of all layers of one transformer.

    Attributes:
        blocks: by the name of their list in diffusers.
        outside: path of a layer outside the blocks in diffusers -> in the original code.
    """

    blocks: Mapping[str, Blocks]
    outside: Mapping[str, str] = field(default_factory=dict)


def original_layer(
    path: str, *, names: TransformerNames, width: int, swapped: Container[str] = ("norm_out.linear",)
) -> OriginalLayer | None:
    """The place of a layer in the original code; None for a layer that has none.

    Args:
        path: in diffusers' transformer.
        names: of this kind of transformer.
        width: of the hidden states, the number of rows of a query's weight.
        swapped: paths of layers whose output is shift and scale there, and scale and shift in diffusers.
    """
    if path in names.outside:
        return OriginalLayer(names.outside[path], swaps_halves=path in swapped)
    match = re.fullmatch(r"(.+?)\.(\d+)\.(.+)", path)
    if match is None or match[1] not in names.blocks:
        return None
    blocks = names.blocks[match[1]]
    prefix = f"{blocks.name}.{match[2]}"
    layer = match[3]
    if layer in blocks.layers:
        return OriginalLayer(f"{prefix}.{blocks.layers[layer]}", swaps_halves=path in swapped)
    for original, heights in blocks.fused.items():
        first_row = 0
        for name, height in heights.items():
            if name == layer:
                return OriginalLayer(f"{prefix}.{original}", first_row, height * width)
            first_row += height * width
    return None


def same_layer(path: str) -> OriginalLayer:
    """The place of a layer in original code whose names are those of diffusers."""
    return OriginalLayer(path)


_QKV = {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1}
_CONTEXT_QKV = {"attn.add_q_proj": 1, "attn.add_k_proj": 1, "attn.add_v_proj": 1}
_FLUX_ATTENTION = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
_FLUX_SINGLE = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
_FLUX_FUSED = {"img_attn.qkv": _QKV, "txt_attn.qkv": _CONTEXT_QKV}
_FLUX_OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
}

FLUX = TransformerNames(
    blocks={
        "transformer_blocks": Blocks(
            "double_blocks",
            layers=_FLUX_ATTENTION
            | {
                "norm1.linear": "img_mod.lin",
                "norm1_context.linear": "txt_mod.lin",
                "ff.net.0.proj": "img_mlp.0",
                "ff.net.2": "img_mlp.2",
                "ff_context.net.0.proj": "txt_mlp.0",
                "ff_context.net.2": "txt_mlp.2",
            },
            fused=_FLUX_FUSED,
        ),
        "single_transformer_blocks": Blocks(
            "single_blocks",
            layers=_FLUX_SINGLE | {"norm.linear": "modulation.lin", "proj_out": "linear2"},
            fused={"linear1": {**_QKV, "proj_mlp": 4}},
        ),
    },
    outside=_FLUX_OUTSIDE
    | {
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    },
)

# Its modulation is one network for all blocks.
CHROMA = TransformerNames(
    blocks={
        **FLUX.blocks,
        "distilled_guidance_layer.layers": Blocks(
            "distilled_guidance_layer.layers", layers={"linear_1": "in_layer", "linear_2": "out_layer"}
        ),
    },
    outside=_FLUX_OUTSIDE
    | {
        "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
        "distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj",
    },
)

FLUX2 = TransformerNames(
    blocks={
        "transformer_blocks": Blocks(
            "double_blocks",
            layers=_FLUX_ATTENTION
            | {
                "ff.linear_in": "img_mlp.0",
                "ff.linear_out": "img_mlp.2",
                "ff_context.linear_in": "txt_mlp.0",
                "ff_context.linear_out": "txt_mlp.2",
            },
            fused=_FLUX_FUSED,
        ),
        "single_transformer_blocks": Blocks(
            "single_blocks",
            layers=_FLUX_SINGLE | {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"},
        ),
    },
    outside=_FLUX_OUTSIDE
    | {
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
    },
)

SD3 = TransformerNames(
    blocks={
        "transformer_blocks": Blocks(
            "joint_blocks",
            layers={
                "norm1.linear": "x_block.adaLN_modulation.1",
                "attn.to_out.0": "x_block.attn.proj",
                "attn.norm_q": "x_block.attn.ln_q",
                "attn.norm_k": "x_block.attn.ln_k",
                "attn2.to_out.0": "x_block.attn2.proj",
                "attn2.norm_q": "x_block.attn2.ln_q",
                "attn2.norm_k": "x_block.attn2.ln_k",
                "ff.net.0.proj": "x_block.mlp.fc1",
                "ff.net.2": "x_block.mlp.fc2",
                "norm1_context.linear": "context_block.adaLN_modulation.1",
                "attn.to_add_out": "context_block.attn.proj",
                "attn.norm_added_q": "context_block.attn.ln_q",
                "attn.norm_added_k": "context_block.attn.ln_k",
                "ff_context.net.0.proj": "context_block.mlp.fc1",
                "ff_context.net.2": "context_block.mlp.fc2",
            },
            fused={
                "x_block.attn.qkv": _QKV,
                "context_block.attn.qkv": _CONTEXT_QKV,
                "x_block.attn2.qkv": {"attn2.to_q": 1, "attn2.to_k": 1, "attn2.to_v": 1},
            },
        ),
    },
    outside={
        "context_embedder": "context_embedder",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    },
)

_Z_IMAGE_BLOCK = {
    "layers": {
        "attention.to_out.0": "attention.out",
        "attention.norm_q": "attention.q_norm",
        "attention.norm_k": "attention.k_norm",
        "attention_norm1": "attention_norm1",
        "attention_norm2": "attention_norm2",
        "ffn_norm1": "ffn_norm1",
        "ffn_norm2": "ffn_norm2",
        "feed_forward.w1": "feed_forward.w1",
        "feed_forward.w2": "feed_forward.w2",
        "feed_forward.w3": "feed_forward.w3",
        "adaLN_modulation.0": "adaLN_modulation.0",
    },
    "fused": {"attention.qkv": {"attention.to_q": 1, "attention.to_k": 1, "attention.to_v": 1}},
}

Z_IMAGE = TransformerNames(
    blocks={name: Blocks(name, **_Z_IMAGE_BLOCK) for name in ("layers", "noise_refiner", "context_refiner")},
    outside={
        "all_x_embedder.2-1": "x_embedder",
        "all_final_layer.2-1.linear": "final_layer.linear",
        "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
        "cap_embedder.0": "cap_embedder.0",
        "cap_embedder.1": "cap_embedder.1",
        "t_embedder.mlp.0": "t_embedder.mlp.0",
        "t_embedder.mlp.2": "t_embedder.mlp.2",
    },
)

_KREA2_LAYERS = {
    "attn.to_q": "attn.wq",
    "attn.to_k": "attn.wk",
    "attn.to_v": "attn.wv",
    "attn.to_gate": "attn.gate",
    "attn.to_out.0": "attn.wo",
    "ff.gate": "mlp.gate",
    "ff.up": "mlp.up",
    "ff.down": "mlp.down",
}

KREA2 = TransformerNames(
    blocks={
        "transformer_blocks": Blocks("blocks", _KREA2_LAYERS),
        "text_fusion.layerwise_blocks": Blocks("txtfusion.layerwise_blocks", _KREA2_LAYERS),
        "text_fusion.refiner_blocks": Blocks("txtfusion.refiner_blocks", _KREA2_LAYERS),
    },
    outside={
        "img_in": "first",
        "time_embed.linear_1": "tmlp.0",
        "time_embed.linear_2": "tmlp.2",
        "time_mod_proj": "tproj.1",
        "txt_in.linear_1": "txtmlp.1",
        "txt_in.linear_2": "txtmlp.3",
        "text_fusion.projector": "txtfusion.projector",
        "final_layer.linear": "last.linear",
    },
)

PIXART = TransformerNames(
    blocks={
        "transformer_blocks": Blocks(
            "blocks",
            layers={
                "attn1.to_out.0": "attn.proj",
                "attn2.to_q": "cross_attn.q_linear",
                "attn2.to_out.0": "cross_attn.proj",
                "ff.net.0.proj": "mlp.fc1",
                "ff.net.2": "mlp.fc2",
            },
            fused={
                "attn.qkv": {"attn1.to_q": 1, "attn1.to_k": 1, "attn1.to_v": 1},
                "cross_attn.kv_linear": {"attn2.to_k": 1, "attn2.to_v": 1},
            },
        ),
    },
    outside={
        "pos_embed.proj": "x_embedder.proj",
        "caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "caption_projection.linear_2": "y_embedder.y_proj.fc2",
        "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "adaln_single.emb.resolution_embedder.linear_1": "csize_embedder.mlp.0",
        "adaln_single.emb.resolution_embedder.linear_2": "csize_embedder.mlp.2",
        "adaln_single.emb.aspect_ratio_embedder.linear_1": "ar_embedder.mlp.0",
        "adaln_single.emb.aspect_ratio_embedder.linear_2": "ar_embedder.mlp.2",
        "adaln_single.linear": "t_block.1",
        "proj_out": "final_layer.linear",
    },
)
