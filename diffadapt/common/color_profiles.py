"""Color profiles: pixels as a camera or a program stored them, converted to sRGB as models expect them."""

from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

UNCHANGED = 2  # of 255; profiles that move no color further are sRGB itself, rounded in their own way
PROBE = 9  # levels of each channel on which a profile is compared with sRGB
CHANNELS = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # color space of a profile -> mode of Pillow
WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")


class UnusableProfile(ValueError):
    """A profile that is damaged, or made for other channels than the image has."""


def convert_to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The image with the colors of its ICC profile in sRGB; transparency stays.

    Args:
        image: of any mode of at most 8 bits per channel.
    Returns: RGB, or RGBA where something is transparent; the image itself where the profile is sRGB.
    Raises: UnusableProfile.
    """
    if image.mode == "LAB":
        return image  # has colors of its own, whatever the profile says
    space = _color_space(profile)
    has_alpha = image.mode in WITH_ALPHA or "transparency" in image.info
    colors = _channels(_opaque(image) if has_alpha else image, space)
    if space == "RGB" and _is_srgb(profile):
        return image
    converted = _transform(profile, colors.mode).apply(colors)
    converted.info.pop("icc_profile", None)
    if has_alpha:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted


def _opaque(image: Image.Image) -> Image.Image:
    """The colors behind the transparency."""
    if image.mode in ("L", "LA"):
        return image.convert("L")
    return image.convert("RGBA").convert("RGB")


def _channels(image: Image.Image, space: str) -> Image.Image:
    """The image in the channels of a profile's color space, where that loses nothing."""
    mode = CHANNELS[space]
    usable = {
        "RGB": image.mode != "CMYK",
        "L": image.mode in ("1", "L"),
        "CMYK": image.mode == "CMYK",
    }
    if not usable[mode]:
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
    """From the profile to sRGB as image viewers do it: relative colors, black to black."""
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
    """Whether a profile leaves a grid of colors as they are."""
    levels = np.linspace(0, 255, PROBE).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    converted = np.asarray(_transform(profile, "RGB").apply(Image.fromarray(grid)))
    return bool(np.abs(converted.astype(int) - grid).max() <= UNCHANGED)
