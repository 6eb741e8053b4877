"""Extractors in the format of transformers: CLIP (arXiv 2103.00020), DINO (2104.14294), DINOv2 (2304.07193).

DreamBooth's DINO score (2208.12242) uses the class token of DINO ViT-S/16 on the middle 224 pixels of an
image whose shorter side is 256.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from diffadapt.evaluation.extractors.base import Extractor, frozen, standardise
from diffadapt.metrics.features import load_clip
from diffadapt.tensor_file import digest

SMALLER, LARGER = 224, 256  # the middle SMALLER pixels of an image whose shorter side is LARGER
KINDS = {"dino": ("vit",), "dinov2": ("dinov2", "dinov2_with_registers")}  # model types in config.json


def clip(name: str, folder: Path, *, preset: str | None, device: str) -> Extractor:
    """Layer "image": unit vectors of the image tower; texts in the same space."""
    model = load_clip(str(folder))
    frozen(model.model, device)
    side = model.model.config.vision_config.image_size

    def network(pixels: Tensor) -> dict[str, Tensor]:
        return {"image": model.encode(pixels / 255)}

    sha256, layer = digest(model.model.state_dict()), "image"
    resize = preset or f"crop-{side}"
    return Extractor(name, sha256, side, resize, (layer,), layer, network, texts=model.texts)


def dino(name: str, folder: Path, *, preset: str | None, device: str) -> Extractor:
    """Layer "cls": unit vectors, the normalised class token of DINO or DINOv2.

    Raises: ValueError when the folder holds another kind of model.
    """
    kind = AutoConfig.from_pretrained(folder).model_type
    wanted = KINDS[name.partition(":")[0]]
    if kind not in wanted:
        raise ValueError(f"{name} needs a model of type {' or '.join(wanted)}, {folder} holds {kind!r}")
    model = frozen(AutoModel.from_pretrained(folder, dtype="float32", use_safetensors=True), device)
    processor = AutoImageProcessor.from_pretrained(folder)
    side = _side(processor)

    def network(pixels: Tensor) -> dict[str, Tensor]:
        images = standardise(pixels.to(device), processor.image_mean, processor.image_std)
        return {"cls": normalize(model(pixel_values=images).last_hidden_state[:, 0], dim=-1)}

    sha256, resize = digest(model.state_dict()), f"crop-{round(side * LARGER / SMALLER)}"
    return Extractor(name, sha256, side, preset or resize, ("cls",), "cls", network)


def _side(processor: object) -> int:
    """The pixels a processor hands on: of its crop where it crops, else of its resize."""
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    return int((crop or processor.size)["height"])
