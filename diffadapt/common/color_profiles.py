"""Conversion of images with an ICC color profile to sRGB, which models expect."""

from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

MAX_SRGB_DIFFERENCE = 2  # of 255; a profile that moves no color further is sRGB with its own rounding
PROBE_LEVELS = 9  # levels of each channel at which a profile is compared with sRGB
CHANNELS = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # color space of a profile -> mode of Pillow
WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")


class UnusableProfile(ValueError):
    """A profile that is damaged, or made for other channels than the image has."""


def convert_to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Converts the colors of an image from its ICC profile to sRGB; transparency stays.

    Args:
        image: an image of any mode with at most 8 bits per channel.
        profile: the ICC profile.

    Returns:
        RGB, or RGBA if anything is transparent; the image itself if the profile is sRGB.

    Raises:
        UnusableProfile: the profile is damaged or does not fit the image.
    """
    if image.mode == "LAB":
        return image  # LAB defines its colors without a profile
    # The transform knows no alpha: the colors are converted without it, and it is put back.
    space = _color_space(profile)
    has_alpha = image.mode in WITH_ALPHA or "transparency" in image.info
    opaque = _without_alpha(image) if has_alpha else image
    colors = _in_profile_mode(opaque, space)
    if space == "RGB" and _is_srgb(profile):
        return image
    converted = _transform(profile, colors.mode).apply(colors)
    converted.info.pop("icc_profile", None)
    if has_alpha:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted


def _without_alpha(image: Image.Image) -> Image.Image:
    """The colors behind the transparency."""
    if image.mode in ("L", "LA"):
        return image.convert("L")
    return image.convert("RGBA").convert("RGB")


def _in_profile_mode(image: Image.Image, space: str) -> Image.Image:
    """The image in the channels of a profile's color space, if the conversion is lossless."""
    mode = CHANNELS[space]
    if mode == "L":
        is_lossless = image.mode in ("1", "L")
    elif mode == "CMYK":
        is_lossless = image.mode == "CMYK"
    else:
        is_lossless = image.mode != "CMYK"
    if not is_lossless:
        raise UnusableProfile(f"the profile is for {space}, the image is {image.mode}")
    return image if image.mode == mode else image.convert(mode)


@lru_cache(maxsize=32)
def _color_space(profile: bytes) -> str:
    """RGB, GRAY or CMYK."""
    try:
        space = ImageCms.ImageCmsProfile(BytesIO(profile)).profile.xcolor_space.strip()
    except (OSError, ImageCms.PyCMSError) as error:
        raise UnusableProfile(f"the profile is damaged ({error})") from None
    if space not in CHANNELS:
        raise UnusableProfile(f"the profile is for {space}")
    return space


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    """The transform from the profile to sRGB that image viewers use.

    It is relative colorimetric and maps black to black.
    """
    try:
        return ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (OSError, ImageCms.PyCMSError) as error:
        raise UnusableProfile(f"the profile cannot be used ({error})") from None


@lru_cache(maxsize=32)
def _is_srgb(profile: bytes) -> bool:
    """Whether an RGB profile leaves a grid of colors as they are, up to rounding."""
    levels = np.linspace(0, 255, PROBE_LEVELS).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)  # (1, levels^3, RGB)
    converted = np.asarray(_transform(profile, "RGB").apply(Image.fromarray(grid)))
    return bool(np.abs(converted.astype(int) - grid).max() <= MAX_SRGB_DIFFERENCE)
