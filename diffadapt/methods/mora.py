"""MoRA: a square matrix between fixed compression and decompression (Jiang et al. 2024, arXiv 2405.12130)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from diffadapt.algebra.expression import Expression, Update
from diffadapt.algebra.layer_maps import LayerMap, LinearMap
from diffadapt.methods.base import Method, Shapes
from diffadapt.methods.ranked import check_choice, check_rank
from diffadapt.methods.site import Site


@dataclass(frozen=True)
class SquareBetween(Expression):
    """``square (r, r)`` applied to blocks of r inputs: their sum (type 1), or each one rotated (type 6)."""

    square: Tensor
    out: int
    fan_in: int
    rotated: bool

    def matrix(self) -> Tensor:
        return self._expand(self._compress(self._eye()) @ self.square.T).T

    def vjp(self, grad: Tensor) -> tuple[Tensor]:
        blocks = self._compress(self._eye())  # (fan_in, n, r)
        grad_blocks = self._expand_adjoint(grad.T, blocks.shape[-2])
        return (torch.einsum("inr,ins->rs", grad_blocks, blocks),)

    def apply(self, layer: LayerMap, x: Tensor, shape: Sequence[int]) -> Tensor | None:
        if not isinstance(layer, LinearMap):
            return None
        return self._expand(layer.apply(self._compress(x), self.square.to(x.dtype)))

    def _eye(self) -> Tensor:
        return torch.eye(self.fan_in, dtype=self.square.dtype, device=self.square.device)

    def _compress(self, x: Tensor) -> Tensor:
        """Blocks (..., n, r) of the inputs, filled up circularly; n = 1 for the sum."""
        r = self.square.shape[0]
        wanted = -(-x.shape[-1] // r) * r
        padded = torch.cat([x] * -(-wanted // x.shape[-1]), -1)[..., :wanted]
        blocks = padded.unflatten(-1, (-1, r))
        return self._rotate(blocks) if self.rotated else blocks.sum(-2, keepdim=True)

    def _expand(self, blocks: Tensor) -> Tensor:
        """Blocks (..., n, r) one after the other, repeated or cut to (..., out)."""
        flat = blocks.flatten(-2)
        return torch.cat([flat] * -(-self.out // flat.shape[-1]), -1)[..., : self.out]

    def _expand_adjoint(self, grad: Tensor, count: int) -> Tensor:
        length = count * self.square.shape[0]
        padded = F.pad(grad, (0, -(-self.out // length) * length - self.out))
        return padded.unflatten(-1, (-1, length)).sum(-2).unflatten(-1, (count, -1))

    def _rotate(self, blocks: Tensor) -> Tensor:
        """Rotary position of every block (RoFormer), halves paired."""
        count, r = blocks.shape[-2:]
        wide = torch.promote_types(blocks.dtype, torch.float32)  # half precision cannot count blocks
        options = {"dtype": wide, "device": blocks.device}
        rate = 10000 ** (-torch.arange(0, r, 2, **options) / r)
        angle = torch.arange(count, **options)[:, None] * rate.repeat(2)  # (n, r)
        cos, sin = angle.cos().to(blocks.dtype), angle.sin().to(blocks.dtype)
        first, second = blocks.chunk(2, -1)
        return blocks * cos + torch.cat([-second, first], -1) * sin


@dataclass(frozen=True)
class MoRA(Method):
    """``y' = y + expand(square @ compress(x))``: rank r' = sqrt((out + fan_in) r), rounded, from one matrix.

    Type 1 sums the inputs in blocks of r' and repeats the result; type 6 rotates every block by its position
    and keeps them apart. Blocks fill up circularly; r' is even for type 6. Parameters: r'^2.
    Source: arXiv 2405.12130, equations 6 and 9; sizes and padding as in its code. 1LoRA's tables compare with
    MoRA at their own size, r' = sqrt(out r): that is ``sized_like="1lora"``; they write floor where only
    rounding gives their counts.
    """

    name: ClassVar[str] = "mora"
    learning_rate: ClassVar[float] = 3e-4

    rank: int = 8  # of the method with as many parameters
    type: int = 1  # 1 (sum) or 6 (rotated blocks)
    sized_like: str = "lora"  # which method has as many parameters: lora or 1lora (out per rank)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank("rank", self.rank)
        if self.type not in (1, 6):
            raise ValueError(f"type must be 1 or 6, got {self.type}")
        check_choice("sized_like", self.sized_like, ("lora", "1lora"))

    def side(self, site: Site) -> int:
        """Rows of the square matrix."""
        per_rank = site.out + (site.fan_in if self.sized_like == "lora" else 0)
        side = int((per_rank * self.rank) ** 0.5 + 0.5)
        return max(2, side // 2 * 2) if self.type == 6 else side

    def trained_tensors(self, site: Site) -> Shapes:
        return {"square": (self.side(site), self.side(site))}

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        return Update(SquareBetween(tensors["square"], site.out, site.fan_in, self.type == 6))
