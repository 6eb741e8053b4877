"""Expressions whose thin factors are small products of the trained tensors, made again in backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.update import Derived, LowRank, Tucker


@dataclass(frozen=True)
class Cored(Derived):
    """``up (out, r_out) @ core (r_out, r_in) @ down (r_in, fan_in)``; the core goes into the shorter side."""

    up: Tensor
    core: Tensor
    down: Tensor

    @property
    def _tall(self) -> bool:
        return self.up.shape[0] > self.down.shape[1]

    def plain(self) -> LowRank:
        if self._tall:
            return LowRank(self.up, self.core @ self.down)
        return LowRank(self.up @ self.core, self.down)

    def derive(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        up, down = grads
        if self._tall:
            return up, down @ self.down.T, self.core.T @ down
        return up @ self.core.T, self.up.T @ up, down


@dataclass(frozen=True)
class CoredTucker(Derived):
    """A Tucker product with the core ``core (r_out, r_in, *kernel ranks)`` times ``kernels`` on its kernel.

    ``kernels (entries, ranks)`` is the Kronecker product of one factor per axis of the kernel ``size``.
    """

    up: Tensor
    core: Tensor
    down: Tensor
    kernels: Tensor
    size: tuple[int, ...]

    def plain(self) -> Tucker:
        core = self.core.flatten(2) @ self.kernels.T
        return Tucker(self.up, core.unflatten(2, self.size), self.down)

    def derive(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        up, core, down = grads
        flat = core.flatten(2)
        kernels = flat.flatten(0, 1).T @ self.core.flatten(2).flatten(0, 1)
        return up, (flat @ self.kernels).reshape(self.core.shape), down, kernels


@dataclass(frozen=True)
class ScaledFactors(Derived):
    """``diag(out_scale) up diag(rank_scale) down``."""

    up: Tensor
    down: Tensor
    out_scale: Tensor
    rank_scale: Tensor

    def plain(self) -> LowRank:
        return LowRank(self.out_scale[:, None] * self.up * self.rank_scale, self.down)

    def derive(self, grads: tuple[Tensor, ...]) -> tuple[None, None, Tensor, Tensor]:
        entries = grads[0] * self.up
        return None, None, entries @ self.rank_scale, self.out_scale @ entries


@dataclass(frozen=True)
class SinceStart(Derived):
    """``up @ down - start_up @ start_down`` as one product of rank 2 r.

    Written as ``(up - start_up) @ down + start_up @ (down - start_down)``: the differences are taken before
    any rounding to half precision, and the start is exactly zero.
    """

    up: Tensor
    down: Tensor
    start_up: Tensor
    start_down: Tensor

    def plain(self) -> LowRank:
        up = torch.cat([self.up - self.start_up, self.start_up], 1)
        return LowRank(up, torch.cat([self.down, self.down - self.start_down], 0))

    def derive(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, None, None]:
        rank = self.up.shape[1]
        return grads[0][:, :rank], grads[1][:rank] + grads[1][rank:], None, None
