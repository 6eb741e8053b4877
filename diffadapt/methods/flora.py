"""FLoRA: a Tucker decomposition of the change, with the convolution's own four axes (arXiv 2405.14739)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffadapt.algebra.expression import Update
from diffadapt.algebra.low_rank import LowRankWithCore, TuckerWithKernelFactors
from diffadapt.methods.base import Shapes
from diffadapt.methods.random_init import draw_normal, draw_orthonormal
from diffadapt.methods.ranked import RankedMethod, check_choice, check_rank
from diffadapt.methods.site import Site


@dataclass(frozen=True)
class FLoRA(RankedMethod):
    """Convolution: `dW = s * G x1 A x2 B x3 C x4 D`; Linear: `dW = s * A G B^T`.

    The core starts at zero. One small convolution, the core times the kernel factors, stands between two 1x1
    maps, so a forward costs about 1 % of the layer. `rank_in` and `rank_out` default to `rank`; ranks above
    what a layer has are accepted, `kernel_rank` is never above the kernel's size.

    Parameters: `r_in r_out r3^2 + r_in in/groups + r_out out + 2 k r3` for a k x k convolution;
    Linear: `r_in r_out + r_in in + r_out out`.

    Source: arXiv 2405.14739, equations 5 to 9. Its Gaussian start (std 0.02 in all factors) makes the first
    gradient of the core vanish; the default start has orthonormal factors.
    """

    name: ClassVar[str] = "flora"
    learning_rate: ClassVar[float] = 1e-3

    rank_in: int | None = None  # rank over input channels
    rank_out: int | None = None  # rank over output channels
    kernel_rank: int = 2  # rank over each kernel axis
    init: str = "orthonormal"  # start of the factors: orthonormal or gaussian

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("rank_in", "rank_out", "kernel_rank"):
            rank = getattr(self, option)
            if rank is not None:
                check_rank(option, rank)
        check_choice("init", self.init, ("orthonormal", "gaussian"))

    def trained_tensors(self, site: Site) -> Shapes:
        r_in = self.rank_in or self.rank
        r_out = self.rank_out or self.rank
        kernel_ranks = [min(self.kernel_rank, size) for size in site.kernel]
        shapes = {
            "core": (r_out, r_in, *kernel_ranks),
            "up": (site.out, r_out),
            "down": (r_in, site.channels_in),
        }
        for axis, size in enumerate(site.kernel):
            shapes[f"kernel_{axis}"] = (size, kernel_ranks[axis])
        return shapes

    def init_tensors(
        self, site: Site, tensors: Mapping[str, Tensor], base: Tensor, generator: torch.Generator
    ) -> None:
        for key, tensor in tensors.items():
            if key == "core":
                continue  # stays zero, so that the change is zero
            if self.init == "gaussian":
                draw_normal(tensor, 0.02, generator)
            else:
                draw_orthonormal(tensor, generator)

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        core = tensors["core"]  # G (r_out, r_in, *kernel_ranks)
        up = tensors["up"]  # A (out, r_out)
        down = tensors["down"]  # B^T (r_in, in/groups)
        if site.kind == "linear":
            return Update(LowRankWithCore(up, core, down), self.multiplier)
        kernel_factors = []  # C and D (k, r3), one for each axis of the kernel
        for axis in range(len(site.kernel)):
            kernel_factors.append(tensors[f"kernel_{axis}"])
        return Update(TuckerWithKernelFactors(up, core, down, *kernel_factors), self.multiplier)
