"""The layers of published models by name and shape, on the meta device: parameter counts follow from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

Build = Callable[[], nn.Module]


def tree(layers: Mapping[str, Build]) -> nn.Module:
    """Modules nested by dotted names."""
    root = nn.Module()
    with torch.device("meta"):
        for name, build in layers.items():
            *path, leaf = name.split(".")
            parent = root
            for piece in path:
                if piece not in parent._modules:
                    parent.add_module(piece, nn.Module())
                parent = parent._modules[piece]
            parent.add_module(leaf, build())
    return root


def linear(width: int, out: int, bias: bool = True) -> Build:
    return lambda: nn.Linear(width, out, bias=bias)


def conv(width: int, out: int, kernel: int, groups: int = 1) -> Build:
    return lambda: nn.Conv2d(width, out, kernel, stride=1 if groups > 1 else kernel, groups=groups)


def norm(width: int, affine: bool = True) -> Build:
    return lambda: nn.LayerNorm(width, elementwise_affine=affine)


def table(rows: int, width: int) -> Build:
    return lambda: nn.Embedding(rows, width)


def repeated(prefix: str, depth: int, layers: Mapping[str, Build]) -> dict[str, Build]:
    return {f"{prefix}.{i}.{name}": build for i in range(depth) for name, build in layers.items()}


def dit_xl_2(classes: int = 101) -> nn.Module:
    """facebookresearch/DiT, DiT-XL/2 at 256x256: queries, keys and values fused, one class table."""
    block = {
        "norm1": norm(1152, affine=False),
        "attn.qkv": linear(1152, 3456),
        "attn.proj": linear(1152, 1152),
        "norm2": norm(1152, affine=False),
        "mlp.fc1": linear(1152, 4608),
        "mlp.fc2": linear(4608, 1152),
        "adaLN_modulation.1": linear(1152, 6912),
    }
    return tree(
        {
            "x_embedder.proj": conv(4, 1152, 2),
            "t_embedder.mlp.0": linear(256, 1152),
            "t_embedder.mlp.2": linear(1152, 1152),
            "y_embedder.embedding_table": table(classes + 1, 1152),
            **repeated("blocks", 28, block),
            "final_layer.norm_final": norm(1152, affine=False),
            "final_layer.adaLN_modulation.1": linear(1152, 2304),
            "final_layer.linear": linear(1152, 32),
        }
    )


def vit_b_hf() -> nn.Module:
    """transformers' ViT-B/16 without a head: queries, keys and values apart."""
    block = {
        "layernorm_before": norm(768),
        "attention.attention.query": linear(768, 768),
        "attention.attention.key": linear(768, 768),
        "attention.attention.value": linear(768, 768),
        "attention.output.dense": linear(768, 768),
        "layernorm_after": norm(768),
        "intermediate.dense": linear(768, 3072),
        "output.dense": linear(3072, 768),
    }
    patches = {"embeddings.patch_embeddings.projection": conv(3, 768, 16)}
    return tree({**patches, **repeated("encoder.layer", 12, block), "layernorm": norm(768)})


def depth_anything_vit_l() -> nn.Module:
    """The DINOv2 encoder of Depth Anything, ViT-L/14: queries, keys and values fused."""
    block = {
        "norm1": norm(1024),
        "attn.qkv": linear(1024, 3072),
        "attn.proj": linear(1024, 1024),
        "norm2": norm(1024),
        "mlp.fc1": linear(1024, 4096),
        "mlp.fc2": linear(4096, 1024),
    }
    return tree({"patch_embed.proj": conv(3, 1024, 14), **repeated("blocks", 24, block), "norm": norm(1024)})


def deberta_v3(width: int = 768, depth: int = 12) -> nn.Module:
    """The six Linears of a layer that the GLUE scripts of FLoRA and LieRA adapt; base by default."""
    block = {
        "attention.self.query_proj": linear(width, width),
        "attention.self.key_proj": linear(width, width),
        "attention.self.value_proj": linear(width, width),
        "attention.output.dense": linear(width, width),
        "intermediate.dense": linear(width, 4 * width),
        "output.dense": linear(4 * width, width),
    }
    return tree(repeated("encoder.layer", depth, block))


def llama(width: int = 4096, hidden: int = 11008, depth: int = 32, key_width: int | None = None) -> nn.Module:
    """LLaMA's decoder layers and head; 7B by default. ``key_width``: grouped keys and values."""
    key_width = key_width or width
    block = {
        "self_attn.q_proj": linear(width, width, bias=False),
        "self_attn.k_proj": linear(width, key_width, bias=False),
        "self_attn.v_proj": linear(width, key_width, bias=False),
        "self_attn.o_proj": linear(width, width, bias=False),
        "mlp.gate_proj": linear(width, hidden, bias=False),
        "mlp.up_proj": linear(width, hidden, bias=False),
        "mlp.down_proj": linear(hidden, width, bias=False),
    }
    return tree({**repeated("model.layers", depth, block), "lm_head": linear(width, 32000, bias=False)})


def convnext_v2(widths: tuple[int, ...]) -> nn.Module:
    """The official ConvNeXt-V2 backbone, (3, 3, 27, 3) blocks; pointwise convolutions are Linears."""
    layers = {"downsample_layers.0.0": conv(3, widths[0], 4)}
    for stage, (width, depth) in enumerate(zip(widths, (3, 3, 27, 3), strict=True)):
        if stage:
            layers[f"downsample_layers.{stage}.1"] = conv(widths[stage - 1], width, 2)
        block = {
            "dwconv": conv(width, width, 7, groups=width),
            "norm": norm(width),
            "pwconv1": linear(width, 4 * width),
            "pwconv2": linear(4 * width, width),
        }
        layers |= repeated(f"stages.{stage}", depth, block)
    return tree(layers)


CONVNEXT_V2_L = (192, 384, 768, 1536)
CONVNEXT_V2_B = (128, 256, 512, 1024)
