"""Resizes images to the size that a network takes, by named rules that are part of a score's identity.

`tf1`         TensorFlow 1's bilinear, without smoothing: the first FID's, torch-fidelity's, ADM's
`torchmetrics` bilinear with smoothing: torchmetrics' default since 1.9
`clean`       bicubic with smoothing, kept within range, not rounded: clean-fid's (arXiv 2104.11222)
`crop-S`      bicubic with smoothing so that the shorter side is S, then the middle: CLIP's and DINO's
`bilinear`    bilinear without smoothing: pytorch-fid's and PIQ's
`pil`         bicubic with smoothing, rounded to whole levels: Pillow's and torchvision's of files, dgm-eval's
`none`        as it is
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffadapt.common.messages import did_you_mean

PRESETS = ("tf1", "clean", "torchmetrics", "bilinear", "pil", "none")
CROP = "crop-"
LARGEST_CROP = 4  # times the network's side: beyond, less than a sixteenth of an image is seen


def resize(images: Tensor, side: int, preset: str) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, side, side) float32 in [0, 255], by a preset's rule.

    Images of that size are left as they are, except that `crop-S` with S above the side still takes their
    middle, as it does of all others.

    Raises:
        ValueError: the preset is unknown, or cannot give this side.
        TypeError: the images are not uint8.
    """
    check_preset(preset, side)
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    pixels = images.float()
    if preset.startswith(CROP):
        return shorter_side_then_middle(pixels, int(preset.removeprefix(CROP)), side)
    if preset == "none" or images.shape[-2:] == (side, side):
        return pixels
    if preset == "tf1":
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        return interpolate_bilinear_2d_like_tensorflow1x(pixels, size=(side, side), align_corners=False)
    if preset in ("torchmetrics", "bilinear"):
        smooth = preset == "torchmetrics"
        return interpolate(pixels, (side, side), mode="bilinear", align_corners=False, antialias=smooth)
    if preset == "clean":
        return _bicubic(pixels, (side, side))
    # preset "pil": Pillow rounds after each of its two passes
    rows = _bicubic(pixels, (pixels.shape[-2], side)).round()
    return _bicubic(rows, (side, side)).round()


def check_preset(preset: str, side: int) -> None:
    """Checks the name of a preset, and its size.

    Raises:
        ValueError: the preset is unknown, or crops from images smaller than the network takes, or so large
            that next to nothing of them remains.
    """
    if preset in PRESETS:
        return
    shorter = preset.removeprefix(CROP)
    if not preset.startswith(CROP) or not shorter.isdecimal():
        raise ValueError(f"unknown resize preset {preset!r}{did_you_mean(preset, [*PRESETS, f'{CROP}SIZE'])}")
    if int(shorter) < side:
        raise ValueError(
            f"resize {preset}: the shorter side would be {shorter}, below the {side} pixels that the network "
            f"takes; give {CROP}{side} or more, or one of {', '.join(PRESETS)}"
        )
    if side > 1 and int(shorter) > LARGEST_CROP * side:
        raise ValueError(
            f"resize {preset}: the network would see {side} of {shorter} pixels, too little of the image; "
            f"give {CROP}{LARGEST_CROP * side} or less"
        )


def shorter_side_then_middle(pixels: Tensor, shorter: int, side: int) -> Tensor:
    """The middle side x side pixels of images whose shorter side becomes `shorter` (at least `side`).

    Args:
        pixels: (B, 3, H, W) float, in [0, 255].
    """
    height, width = pixels.shape[-2:]
    scale = shorter / min(height, width)
    # truncated, as the processors of CLIP and DINO do; the shorter side must not lose a pixel by rounding
    pixels = _bicubic(pixels, (max(shorter, int(height * scale)), max(shorter, int(width * scale))))
    # the middle; of an odd margin the smaller half is cut above and on the left
    y = (pixels.shape[-2] - side) // 2
    x = (pixels.shape[-1] - side) // 2
    return pixels[..., y : y + side, x : x + side]


def _bicubic(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic with smoothing, kept within [0, 255]; images of that size are left as they are."""
    if pixels.shape[-2:] == size:
        return pixels
    return interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
