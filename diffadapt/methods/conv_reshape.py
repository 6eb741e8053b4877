"""How a convolution's four axes become a matrix for methods defined on matrices."""

from __future__ import annotations

from torch import Tensor

from diffadapt.algebra.expression import Expression
from diffadapt.algebra.full_rank import ReshapedLowRank
from diffadapt.algebra.low_rank import LowRank
from diffadapt.methods.base import Shapes
from diffadapt.methods.site import Site

RESHAPES = ("peft", "loralib")


def factor_shapes(site: Site, rank: int, reshape: str) -> Shapes:
    """Shapes of `up` and `down` for the product `up @ down` of a site.

    `peft`: the matrix (out, in/groups * kernel) with inner rank r. `loralib`: the matrix
    (out/groups * k, in * k) with inner rank r * k, as in microsoft/LoRA's ConvLoRA, which the papers' printed
    counts use.

    Args:
        site: the weight to change.
        rank: the rank r.
        reshape: one of `RESHAPES`; without effect on layers that are no convolutions.

    Raises:
        ValueError: the kernel is not square, which `loralib` needs.
    """
    if reshape == "peft" or not site.kernel:
        return {"up": (site.out, rank), "down": (rank, site.fan_in)}
    if len(site.kernel) != 2 or site.kernel[0] != site.kernel[1]:
        raise ValueError(
            f"{site.name}: conv_reshape='loralib' needs a square 2-D kernel, got {site.kernel}; use 'peft'"
        )
    k = site.kernel[0]
    channels = site.channels_in * site.groups
    return {"up": (site.out // site.groups * k, rank * k), "down": (rank * k, channels * k)}


def low_rank_change(site: Site, up: Tensor, down: Tensor) -> Expression:
    """`up @ down`, in the shapes of `factor_shapes`, as a change of the site's matrix."""
    product = LowRank(up, down)
    if up.shape[0] == site.out and down.shape[1] == site.fan_in:
        return product
    return ReshapedLowRank(product, (site.out, site.fan_in))
