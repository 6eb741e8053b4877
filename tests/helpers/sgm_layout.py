"""Pipelines as one file in the layout of the original code (CompVis, Stability), written for tests.

The names are those of CompVis/stable-diffusion and Stability-AI/generative-models: a UNet of numbered blocks,
an autoencoder whose decoder counts levels from below, OpenAI's CLIP under transformers' names, and OpenCLIP
with its query, key and value in one matrix.
"""

import re
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

State = dict[str, Tensor]

_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
_UNET = (
    ("conv_in", "input_blocks.0.0"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
)
_VAE = (
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"resnets", "block"),
    (r"downsamplers\.0\.conv", "downsample.conv"),
    (r"upsamplers\.0\.conv", "upsample.conv"),
    (r"down_blocks", "down"),
    (r"(attn_1\.)group_norm", r"\1norm"),
    (r"(attn_1\.)to_([qkv])", r"\1\2"),
    (r"(attn_1\.)to_out\.0", r"\1proj_out"),
)
_OPEN_CLIP = (
    (r"^text_model\.", ""),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"layer_norm1", "ln_1"),
    (r"layer_norm2", "ln_2"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^embeddings\.token_embedding", "token_embedding"),
    (r"^final_layer_norm", "ln_final"),
)


def write_single_file(folder: Path, file: Path, *, marks: tuple[str, ...] = ()) -> Path:
    """Writes a pipeline's folder as one file, and beside it the folder's configurations and tokenizers.

    Args:
        marks: names of empty tensors to add, such as ``v_pred``.
    """
    pipe = DiffusionPipeline.from_pretrained(folder)
    state = {f"model.diffusion_model.{key}": value for key, value in unet_layout(pipe.unet).items()}
    state |= {f"first_stage_model.{key}": value for key, value in vae_layout(pipe.vae).items()}
    state |= text_layout(pipe)
    state |= {name: torch.zeros(0) for name in marks}
    save_file({key: value.contiguous() for key, value in state.items()}, file)
    weights = shutil.ignore_patterns("*.safetensors", "words")
    shutil.copytree(folder, file.with_suffix(""), ignore=weights)
    return file


def unet_layout(unet: nn.Module) -> State:
    resnets = unet.config.layers_per_block
    state = {_unet_name(key, resnets): value for key, value in unet.state_dict().items()}
    attended = {key.rsplit(".1.norm.", 1)[0] for key in state if ".1.norm." in key}
    slot = lambda key: "2" if key.split(".UP.")[0] in attended else "1"  # noqa: E731, behind an attention
    return {key.replace(".UP.", f".{slot(key)}."): value for key, value in state.items()}


def _unet_name(key: str, resnets: int) -> str:
    for ours, theirs in _UNET:
        if key.startswith(f"{ours}."):
            return key.replace(ours, theirs)
    side, *rest = key.split(".")
    if side == "mid_block":
        kind, number, *inner = rest
        place = 2 * int(number) + (kind == "attentions")
        return _inside(f"middle_block.{place}", kind, inner)
    block, kind, number, *inner = rest
    if kind == "downsamplers":
        return f"input_blocks.{(int(block) + 1) * (resnets + 1)}.0.op.{inner[-1]}"
    if kind == "upsamplers":
        place = int(block) * (resnets + 1) + resnets
        return f"output_blocks.{place}.UP.conv.{inner[-1]}"
    first, name = (1, "input_blocks") if side == "down_blocks" else (0, "output_blocks")
    place = int(block) * (resnets + 1) + int(number) + first
    return _inside(f"{name}.{place}.{int(kind == 'attentions')}", kind, inner)


def _inside(place: str, kind: str, inner: list[str]) -> str:
    path = ".".join(inner)
    if kind == "resnets":
        for ours, theirs in _RESNET:
            path = re.sub(rf"^{ours}\.", f"{theirs}.", path)
    return f"{place}.{path}"


def vae_layout(vae: nn.Module) -> State:
    levels, state = len(vae.config.up_block_types), {}
    for key, value in vae.state_dict().items():
        key = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", key)
        for ours, theirs in _VAE:
            key = re.sub(ours, theirs, key)
        is_projection = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key)
        state[key] = value[:, :, None, None] if is_projection else value
    return state


def text_layout(pipe: DiffusionPipeline) -> State:
    first = "conditioner.embedders.0" if hasattr(pipe, "text_encoder_2") else "cond_stage_model"
    state = {
        f"{first}.transformer.text_model.{key.removeprefix('text_model.')}": value
        for key, value in pipe.text_encoder.state_dict().items()
    }
    if hasattr(pipe, "text_encoder_2"):
        second = open_clip_layout(pipe.text_encoder_2)
        state |= {f"conditioner.embedders.1.model.{key}": value for key, value in second.items()}
    return state


def open_clip_layout(encoder: nn.Module) -> State:
    state, attention = {}, {}
    for key, value in encoder.state_dict().items():
        if key == "text_projection.weight":
            state["text_projection"] = value.T
            continue
        for ours, theirs in _OPEN_CLIP:
            key = re.sub(ours, theirs, key)
        match = re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", key)
        if match:
            attention.setdefault(f"{match[1]}.attn.in_proj_{match[3]}", {})[match[2]] = value
        else:
            state[key] = value
    return state | {key: torch.cat([parts[name] for name in "qkv"]) for key, parts in attention.items()}
