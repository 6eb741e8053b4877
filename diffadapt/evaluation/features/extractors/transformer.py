"""Extractors in the format of transformers: CLIP (arXiv 2103.00020), DINO (2104.14294), DINOv2 (2304.07193).

DreamBooth's DINO score (2208.12242) uses the class token of DINO ViT-S/16 on the middle 224 pixels of an
image whose shorter side is 256.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from diffadapt.common.safetensors_file import hash_tensors
from diffadapt.evaluation.features.extractors.base import Extractor, frozen, standardise
from diffadapt.metrics.features import load_clip

CROP_SIDE = 224  # the middle CROP_SIDE pixels ...
RESIZED_SIDE = 256  # ... of an image whose shorter side is RESIZED_SIDE
MODEL_TYPES = {"dino": ("vit",), "dinov2": ("dinov2", "dinov2_with_registers")}  # in config.json
CLASS_TOKEN = "class_token"
UNIT_CLASS_TOKENS = {  # model type -> name of the layer of unit length, part of the identity of scores
    "vit": "cls",
    "dinov2": "unit_class_token",
    "dinov2_with_registers": "cls",
}
POSITION_OFFSET = 0.1  # patches that DINOv2's authors add to the size of the grid of positions


def clip(name: str, folder: Path, *, preset: str | None, device: str) -> Extractor:
    """CLIP: layer "image", unit vectors of the image tower; texts in the same space.

    On request "embedding": the same vectors before they are scaled to length 1, as clean-fid takes them. The
    default resize is `crop-SIDE`, SIDE the size that the image tower takes.
    """
    clip_model = load_clip(str(folder))
    frozen(clip_model.model, device)
    side = clip_model.model.config.vision_config.image_size

    def network(pixels: Tensor) -> dict[str, Tensor]:
        embedding = clip_model.embed(pixels / 255)
        return {"image": normalize(embedding, dim=-1), "embedding": embedding}

    return Extractor(
        name=name,
        sha256=hash_tensors(clip_model.model.state_dict()),
        side=side,
        preset=preset or f"crop-{side}",
        layers=("image",),
        feature_layer="image",
        network=network,
        embed_texts=clip_model.texts,
        text_length=clip_model.text_length,
        count_tokens=clip_model.count_tokens,
        role_layers={"raw": "embedding"},
    )


def dino(name: str, folder: Path, *, preset: str | None, device: str) -> Extractor:
    """DINO or DINOv2: layer "class_token", for distances as published, and the same of length 1, for cosines.

    The layer of length 1 is "cls" of DINO and "unit_class_token" of DINOv2, whose positions are interpolated
    as its authors' code does it.

    Raises:
        ValueError: the folder holds another type of model.
    """
    model_type = AutoConfig.from_pretrained(folder).model_type
    expected_types = MODEL_TYPES[name.partition(":")[0]]
    if model_type not in expected_types:
        raise ValueError(
            f"{name} needs a model of type {' or '.join(expected_types)}, {folder} holds {model_type!r}"
        )
    model = frozen(AutoModel.from_pretrained(folder, dtype="float32", use_safetensors=True), device)
    unit_layer = UNIT_CLASS_TOKENS[model_type]
    if model_type == "dinov2":
        model.embeddings.interpolate_pos_encoding = partial(_interpolate_positions, model.embeddings)
    processor = AutoImageProcessor.from_pretrained(folder)
    side = _processor_side(processor)

    def network(pixels: Tensor) -> dict[str, Tensor]:
        images = standardise(pixels.to(device), processor.image_mean, processor.image_std)
        token = model(pixel_values=images).last_hidden_state[:, 0]  # the class token, (B, D)
        return {CLASS_TOKEN: token, unit_layer: normalize(token, dim=-1)}

    return Extractor(
        name=name,
        sha256=hash_tensors(model.state_dict()),
        side=side,
        preset=preset or f"crop-{round(side * RESIZED_SIDE / CROP_SIDE)}",
        layers=(CLASS_TOKEN, unit_layer),
        feature_layer=CLASS_TOKEN,
        network=network,
        role_layers={"unit": unit_layer},
    )


def _interpolate_positions(embeddings: nn.Module, tokens: Tensor, height: int, width: int) -> Tensor:
    """Position embeddings of DINOv2 for images of another size, (1, 1 + patches, D).

    The authors give `interpolate` a scale, (patches + 0.1) / grid, where transformers gives it a size: the
    places that are looked up differ by up to 0.1 / grid of the image.

    Source: facebookresearch/dinov2, vision_transformer.py, interpolate_pos_encoding with its default offset.
    """
    positions = embeddings.position_embeddings  # (1, 1 + grid^2, D)
    grid = round((positions.shape[1] - 1) ** 0.5)
    rows = height // embeddings.patch_size
    columns = width // embeddings.patch_size
    if rows == columns == grid:
        return positions
    patches = positions[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)  # (1, D, grid, grid)
    scale = ((rows + POSITION_OFFSET) / grid, (columns + POSITION_OFFSET) / grid)
    patches = interpolate(patches.float(), scale_factor=scale, mode="bicubic").to(positions.dtype)
    return torch.cat([positions[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _processor_side(processor: object) -> int:
    """The pixels that a processor's images have: of its crop where it crops, else of its resize."""
    crop_size = getattr(processor, "crop_size", None)
    if getattr(processor, "do_center_crop", False) and crop_size:
        return int(crop_size["height"])
    return int(processor.size["height"])
