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

SMALLER, LARGER = 224, 256  # the middle SMALLER pixels of an image whose shorter side is LARGER
KINDS = {"dino": ("vit",), "dinov2": ("dinov2", "dinov2_with_registers")}  # model types in config.json
RAW = "class_token"
OFFSET = 0.1  # patches that DINOv2's authors add to the size of the grid of positions


def clip(name: str, folder: Path, *, preset: str | None, device: str) -> Extractor:
    """Layer "image": unit vectors of the image tower; texts in the same space.

    When asked for "embedding": the same vectors before they are brought to length 1, as clean-fid takes them.
    """
    model = load_clip(str(folder))
    frozen(model.model, device)
    side = model.model.config.vision_config.image_size

    def network(pixels: Tensor) -> dict[str, Tensor]:
        embedding = model.embed(pixels / 255)
        return {"image": normalize(embedding, dim=-1), "embedding": embedding}

    sha256, layer = hash_tensors(model.model.state_dict()), "image"
    resize = preset or f"crop-{side}"
    roles = {"raw": "embedding"}
    return Extractor(
        name,
        sha256,
        side,
        resize,
        (layer,),
        layer,
        network,
        texts=model.texts,
        text_length=model.text_length,
        count_tokens=model.count_tokens,
        roles=roles,
    )


def dino(name: str, folder: Path, *, preset: str | None, device: str) -> Extractor:
    """Layers "class_token", for distances as published, and the same of length 1, for cosines.

    The layer of length 1 is "cls" of DINO and "unit_class_token" of DINOv2, whose positions are interpolated
    as its authors' code does it.

    Raises: ValueError when the folder holds another kind of model.
    """
    kind = AutoConfig.from_pretrained(folder).model_type
    wanted = KINDS[name.partition(":")[0]]
    if kind not in wanted:
        raise ValueError(f"{name} needs a model of type {' or '.join(wanted)}, {folder} holds {kind!r}")
    model = frozen(AutoModel.from_pretrained(folder, dtype="float32", use_safetensors=True), device)
    unit = "cls"
    if kind == "dinov2":
        unit = "unit_class_token"
        model.embeddings.interpolate_pos_encoding = partial(_positions, model.embeddings)
    processor = AutoImageProcessor.from_pretrained(folder)
    side = _side(processor)

    def network(pixels: Tensor) -> dict[str, Tensor]:
        images = standardise(pixels.to(device), processor.image_mean, processor.image_std)
        token = model(pixel_values=images).last_hidden_state[:, 0]
        return {RAW: token, unit: normalize(token, dim=-1)}

    sha256, resize = hash_tensors(model.state_dict()), f"crop-{round(side * LARGER / SMALLER)}"
    roles = {"unit": unit}
    return Extractor(name, sha256, side, preset or resize, (RAW, unit), RAW, network, roles=roles)


def _positions(embeddings: nn.Module, tokens: Tensor, height: int, width: int) -> Tensor:
    """Position embeddings of DINOv2 for images of another size, (1, 1 + patches, D).

    The authors give `interpolate` a scale, (patches + 0.1) / grid, where transformers gives it a size: the
    places that are looked up differ by up to 0.1 / grid of the image.

    Source: facebookresearch/dinov2, vision_transformer.py, interpolate_pos_encoding with its default offset.
    """
    positions = embeddings.position_embeddings
    grid = round((positions.shape[1] - 1) ** 0.5)
    rows = height // embeddings.patch_size
    columns = width // embeddings.patch_size
    if rows == columns == grid:
        return positions
    patches = positions[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)  # (1, D, grid, grid)
    scale = ((rows + OFFSET) / grid, (columns + OFFSET) / grid)
    patches = interpolate(patches.float(), scale_factor=scale, mode="bicubic").to(positions.dtype)
    return torch.cat([positions[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _side(processor: object) -> int:
    """The pixels a processor hands on: of its crop where it crops, else of its resize."""
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    return int((crop or processor.size)["height"])
