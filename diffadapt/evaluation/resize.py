"""How an image gets the size that a network wants: part of every metric's identity, so it has a name.

`tf1`         TensorFlow 1's bilinear, without smoothing: the first FID's, torch-fidelity's, ADM's
`torchmetrics` bilinear with smoothing: torchmetrics' default since 1.9
`clean`       bicubic with smoothing, kept within range, not rounded: clean-fid's (arXiv 2104.11222)
`crop-S`      bicubic with smoothing so that the shorter side is S, then the middle: CLIP's and DINO's
`bilinear`    bilinear without smoothing: pytorch-fid's and PIQ's
`none`        as it is
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from diffadapt.nearest import near

PRESETS = ("tf1", "clean", "torchmetrics", "bilinear", "none")


def resize(images: Tensor, side: int, preset: str) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, side, side) float32 in [0, 255], by a preset's rule.

    Images of the wanted size are left as they are under every preset.

    Raises: ValueError for an unknown preset.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    pixels = images.float()
    if preset == "none" or images.shape[-2:] == (side, side):
        return pixels
    if preset == "tf1":
        return interpolate_bilinear_2d_like_tensorflow1x(pixels, size=(side, side), align_corners=False)
    if preset in ("torchmetrics", "bilinear"):
        smooth = preset == "torchmetrics"
        return interpolate(pixels, (side, side), mode="bilinear", align_corners=False, antialias=smooth)
    if preset == "clean":
        return _bicubic(pixels, (side, side))
    if preset.startswith("crop-") and preset[5:].isdecimal():
        return _shorter_side_then_middle(pixels, int(preset[5:]), side)
    raise ValueError(f"unknown resize preset {preset!r}{near(preset, [*PRESETS, f'crop-{side}'])}")


def _shorter_side_then_middle(pixels: Tensor, shorter: int, side: int) -> Tensor:
    height, width = pixels.shape[-2:]
    scale = shorter / min(height, width)
    pixels = _bicubic(pixels, (max(shorter, int(height * scale)), max(shorter, int(width * scale))))
    top, left = ((length - side) // 2 for length in pixels.shape[-2:])
    return pixels[..., top : top + side, left : left + side]


def _bicubic(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    if pixels.shape[-2:] == size:
        return pixels
    return interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
