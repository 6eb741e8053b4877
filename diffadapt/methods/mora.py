"""MoRA: a square matrix between fixed compression and decompression (Jiang et al. 2024, arXiv 2405.12130)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from diffadapt.algebra.expression import ExportForm, Expression, Update
from diffadapt.algebra.full_rank import Dense, low_rank_or_dense
from diffadapt.algebra.layer_maps import LayerMap, LinearMap
from diffadapt.algebra.low_rank import LowRank
from diffadapt.methods.base import Method, Shapes
from diffadapt.methods.ranked import check_choice, check_rank
from diffadapt.methods.site import Site


@dataclass(frozen=True)
class SquareBetween(Expression):
    """A square matrix between the fixed maps of MoRA: `expand(square @ compress(x))`.

    Inputs are cut into n blocks of r, filled up circularly. Type 1 sums the blocks; type 6 rotates each by
    its position and keeps them apart.

    Attributes:
        square: the trained matrix `(r, r)`.
        out: outputs of the layer.
        fan_in: inputs of the layer.
        rotated: whether it is type 6.
    """

    square: Tensor
    out: int
    fan_in: int
    rotated: bool

    depends_on_base = False

    def matrix(self) -> Tensor:
        # column i of the matrix is the output for the unit vector i
        blocks = self._compress(self._unit_vectors())  # (fan_in, n, r)
        return self._expand(blocks @ self.square.T).T  # (out, fan_in)

    def vjp(self, grad: Tensor) -> tuple[Tensor]:
        blocks = self._compress(self._unit_vectors())  # (fan_in, n, r)
        grad_blocks = self._expand_adjoint(grad.T, blocks.shape[-2])  # (fan_in, n, r)
        return (torch.einsum("inr,ins->rs", grad_blocks, blocks),)

    def export_form(self, factor: float = 1.0) -> ExportForm:
        matrix = factor * self.matrix()
        if self.rotated:
            return low_rank_or_dense(matrix)
        # type 1: the rows repeat after the first r, so the others are a selection of these
        side = self.square.shape[0]
        out = matrix.shape[0]
        if side >= min(matrix.shape):
            return Dense(matrix)
        identity = torch.eye(side, dtype=matrix.dtype, device=matrix.device)
        return LowRank(identity.repeat(math.ceil(out / side), 1)[:out], matrix[:side])

    def apply(self, layer: LayerMap, x: Tensor, shape: Sequence[int]) -> Tensor | None:
        if not isinstance(layer, LinearMap):
            return None
        return self._expand(layer.apply(self._compress(x), self.square.to(x.dtype)))

    def _unit_vectors(self) -> Tensor:
        return torch.eye(self.fan_in, dtype=self.square.dtype, device=self.square.device)

    def _compress(self, x: Tensor) -> Tensor:
        """Blocks `(..., n, r)` of the inputs `(..., fan_in)`; n = 1 for the sum."""
        r = self.square.shape[0]
        length = -(-x.shape[-1] // r) * r  # whole blocks, rounded up
        repeats = -(-length // x.shape[-1])  # 1 if r divides the inputs, else 2 or more
        padded = torch.cat([x] * repeats, -1)[..., :length]
        blocks = padded.unflatten(-1, (-1, r))
        return self._rotate(blocks) if self.rotated else blocks.sum(-2, keepdim=True)

    def _expand(self, blocks: Tensor) -> Tensor:
        """Blocks `(..., n, r)` one after the other, repeated or cut to `(..., out)`."""
        flat = blocks.flatten(-2)  # (..., n r)
        repeats = -(-self.out // flat.shape[-1])
        return torch.cat([flat] * repeats, -1)[..., : self.out]

    def _expand_adjoint(self, grad: Tensor, count: int) -> Tensor:
        """The gradient `(..., count, r)` of the blocks, given that of their expansion `(..., out)`."""
        length = count * self.square.shape[0]
        repeats = -(-self.out // length)
        padded = F.pad(grad, (0, repeats * length - self.out))
        return padded.unflatten(-1, (-1, length)).sum(-2).unflatten(-1, (count, -1))

    def _rotate(self, blocks: Tensor) -> Tensor:
        """Rotary position of every block (RoFormer, arXiv 2104.09864), halves paired.

        With the halves `a, b` of block n and the angles `n theta`:

            a' = a cos(n theta) - b sin(n theta)        b' = b cos(n theta) + a sin(n theta)
        """
        count, r = blocks.shape[-2:]
        # half precision cannot count blocks
        options = {"dtype": torch.promote_types(blocks.dtype, torch.float32), "device": blocks.device}
        theta = 10000 ** (-torch.arange(0, r, 2, **options) / r)  # (r / 2,)
        angle = torch.arange(count, **options)[:, None] * theta.repeat(2)  # (n, r)
        cos = angle.cos().to(blocks.dtype)
        sin = angle.sin().to(blocks.dtype)
        first, second = blocks.chunk(2, -1)
        return blocks * cos + torch.cat([-second, first], -1) * sin


@dataclass(frozen=True)
class MoRA(Method):
    """`y' = y + expand(square @ compress(x))`: rank r' = sqrt((out + fan_in) r), rounded, from one matrix.

    Type 1 sums the inputs in blocks of r' and repeats the result; type 6 rotates every block by its position
    and keeps them apart. Blocks fill up circularly; r' is even for type 6.

    Parameters: r'^2.

    Source: arXiv 2405.12130, equations 6 and 9; sizes and padding as in its code. 1LoRA's tables compare with
    MoRA at their own size, r' = sqrt(out r): that is `sized_like="1lora"`; they write floor where only
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
        """The size r' of the square matrix."""
        parameters_per_rank = site.out
        if self.sized_like == "lora":
            parameters_per_rank += site.fan_in
        side = int((parameters_per_rank * self.rank) ** 0.5 + 0.5)  # rounded
        return max(2, side // 2 * 2) if self.type == 6 else side

    def trained_tensors(self, site: Site) -> Shapes:
        side = self.side(site)
        return {"square": (side, side)}

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        return Update(SquareBetween(tensors["square"], site.out, site.fan_in, self.type == 6))
