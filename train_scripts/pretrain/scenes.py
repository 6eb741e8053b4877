"""Training images of the embedded models: an emoji on white, on a colour, or beside another one; captions.

Plain emoji are most of it; the rest gives words like "on a blue background" and "next to a pizza emoji" a
meaning, so that a subject taught later can be asked for in a new context. Imported by the other recipes.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from emoji_data import STYLES, article, captions, load
from torch import Tensor

COLOURS = {
    "red": (226, 68, 68),
    "orange": (245, 158, 66),
    "yellow": (250, 222, 90),
    "green": (98, 178, 92),
    "blue": (82, 140, 225),
    "purple": (150, 100, 200),
    "pink": (245, 160, 190),
    "black": (24, 24, 28),
}
WHITE = (255, 255, 255)
KINDS = ("plain", "ground", "pair")
SHARES = (80, 12, 8)  # per cent of each kind


def composite(rgba: Tensor, colour: tuple[int, int, int] = WHITE) -> Tensor:
    """Lays (..., H, W, 4) uint8 images on one colour: (..., 3, H, W) in [-1, 1]."""
    pixels = rgba.movedim(-1, -3).float() / 255  # (..., 4, H, W)
    colours = pixels[..., :3, :, :]
    alpha = pixels[..., 3:, :, :]
    ground = torch.tensor(colour).view(3, 1, 1) / 255
    return (colours * alpha + ground * (1 - alpha)) * 2 - 1


def on_ground(rgba: Tensor, colour: tuple[int, int, int]) -> Tensor:
    """One emoji at three quarters of its size in the middle of a colour, (3, 64, 64)."""
    small = F.interpolate(composite(rgba, colour)[None], size=48, mode="bilinear", antialias=True)[0]
    image = (torch.tensor(colour) / 127.5 - 1).view(3, 1, 1).repeat(1, 64, 64)
    image[:, 8:56, 8:56] = small  # 48 of 64 pixels
    return image


def side_by_side(first: Tensor, second: Tensor) -> Tensor:
    """Two (3, 64, 64) images at half size, from left to right, on one white image."""
    small_first, small_second = F.interpolate(torch.stack([first, second]), size=32, mode="area")
    image = torch.ones_like(first)
    image[:, 16:48, :32] = small_first
    image[:, 16:48, 32:] = small_second
    return image


class Scenes:
    """Images with captions, each a pure function of its number and a random generator.

    Attributes:
        rgba: images of single emoji, (N, 64, 64, 4) uint8.
        concept: number of the emoji of each image.
        style: number of the vendor of each image.
        concepts: the emoji.
    """

    def __init__(self, build: Path) -> None:
        self.rgba, concept, style, self.concepts = load(build)
        self.concept: list[int] = concept.tolist()
        self.style: list[int] = style.tolist()

    def caption(self, index: int, rng: random.Random) -> str:
        """A caption of the image, without any scene."""
        names = self.concepts[self.concept[index]]["names"]
        return rng.choice(captions(names, STYLES[self.style[index]]))

    def draw(self, index: int, rng: random.Random, *, kind: str | None = None) -> tuple[Tensor, str]:
        """The image `index` as (3, 64, 64) in [-1, 1] in a scene of some kind, and its caption."""
        kind = kind or rng.choices(KINDS, SHARES)[0]
        text = self.caption(index, rng)
        if kind == "ground":
            colour = rng.choice(list(COLOURS))
            text = article(f"{text} on a {colour} background")
            return on_ground(self.rgba[index], COLOURS[colour]), text
        if kind == "pair":
            other = rng.randrange(len(self.concept))
            name = rng.choice(self.concepts[self.concept[index]]["names"])
            other_name = rng.choice(self.concepts[self.concept[other]]["names"])
            relation = rng.choice(("and", "next to"))
            text = article(f"a {name} emoji {relation} a {other_name} emoji")
            return side_by_side(composite(self.rgba[index]), composite(self.rgba[other])), text
        return composite(self.rgba[index]), text


def augment(images: Tensor, generator: torch.Generator, *, zoom: float, gain: float) -> Tensor:
    """Random flip, scale, shift and colour of (B, 3, H, W) images in [-1, 1]; white comes in at the edges.

    Args:
        zoom: largest relative change of size; the shift is up to a tenth of the image.
        gain: largest change of the logarithm of each channel's exponent (white stays white), and of a
            soft shading's.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * 2 - 1

    count, _, height, width = images.shape
    size = 1 + zoom * uniform(count)  # (B,)
    flip = uniform(count).sign()  # (B,)
    theta = torch.zeros(count, 2, 3)  # affine maps
    theta[:, 0, 0] = size * flip
    theta[:, 1, 1] = size
    theta[:, :, 2] = 0.2 * uniform(count, 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    ink = F.grid_sample((1 - images) / 2, grid, align_corners=False)  # 0 is white, also outside
    shade = F.interpolate(uniform(count, 1, 3, 3), size=(height, width), mode="bicubic", align_corners=True)
    # (1 - ink) ** exp(gain * (u_channel + u_pixel)): the exponent is positive, so white stays white
    exponent = (gain * (uniform(count, 3, 1, 1) + shade)).exp()
    return (1 - ink).clamp(0, 1) ** exponent * 2 - 1
