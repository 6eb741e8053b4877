"""One adapter at a smaller rank, or several as one: changes of layers in the forms that files hold."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from diffadapt.formats.foreign.stored_change import StoredChange
from diffadapt.formats.layer_change import LayerChange


@torch.no_grad()
def resized(
    layers: Iterable[LayerChange], *, rank: int | None = None, energy: float | None = None
) -> tuple[dict[str, StoredChange], float]:
    """Cuts every weight's change to a rank by its singular values; biases, norms and embeddings stay.

    Args:
        layers: the changes of an adapter, or the sums of those of several.
        rank: the largest rank of a layer.
        energy: in place of a rank, the share of each layer's squared change to keep, in (0, 1].

    Returns:
        The changes by site name, and the share of the whole squared change that is kept.

    Raises:
        ValueError: neither or both of rank and energy are given, or one is out of range.
    """
    if (rank is None) == (energy is None):
        raise ValueError("give either a rank or an energy")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be a whole number >= 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    changes = {}
    squares_kept = squares = 0.0
    for layer in layers:
        bias = layer.bias_change()
        if layer.site.kind in ("norm", "embedding"):
            difference = layer.weight_change()
            changes[layer.site.name] = _dense(difference, bias)
            layer_squares = difference.square().sum().item()
            squares_kept += layer_squares
        else:
            u, values, vh = layer.singular_vectors()  # (out, n), (n,), (n, fan_in)
            layer_squares = values.square().sum().item()  # of the change: |U S Vh|^2 = |S|^2
            count = rank_for_energy(values, energy) if rank is None else min(rank, len(values))
            squares_kept += values[:count].square().sum().item()
            if layer_squares == 0 and bias is not None:  # factors of zeros would only take space
                changes[layer.site.name] = StoredChange("bias", {"bias": bias})
            else:
                # U_r S_r Vh_r; half of S_r goes to each factor, so that neither is small in half precision
                root = values[:count].sqrt()  # (r,)
                changes[layer.site.name] = _lora(u[:, :count] * root, root[:, None] * vh[:count], bias)
        squares += layer_squares
    return changes, squares_kept / squares if squares else 1.0


@torch.no_grad()
def combined(layers: Iterable[LayerChange]) -> tuple[dict[str, StoredChange], float]:
    """Writes sums of changes down: low-rank ones by joined factors, others as one whole difference.

    Returns:
        The changes by site name, and the relative error of the sum in float32.
    """
    changes = {}
    squared_error = squares = 0.0
    for layer in layers:
        site = layer.site
        difference = layer.weight_change()
        factors = layer.factors()
        # joined factors of full rank would be larger than the difference, and less exact
        is_thin = factors is not None and factors.up.shape[1] < min(site.out, site.fan_in)
        if is_thin and site.kind in ("linear", "conv"):
            changes[site.name] = _lora(factors.up, factors.down, layer.bias_change())
            stored = factors.up.float() @ factors.down.float()  # (out, fan_in)
        else:
            changes[site.name] = _dense(difference, layer.bias_change())
            stored = difference.float()
        squared_error += (stored.double().reshape(difference.shape) - difference).square().sum().item()
        squares += difference.square().sum().item()
    return changes, (squared_error / squares) ** 0.5 if squares else 0.0


def rank_for_energy(values: Tensor, energy: float) -> int:
    """The smallest rank that keeps a share of the sum of squares of falling singular `values`."""
    squares = values.square()
    if squares.sum() == 0:
        return 1
    shares = squares.cumsum(0) / squares.sum()  # (n,), rising to 1
    # energy 1 would else ask for ranks that only the rounding of the sum tells from nothing
    return min(int((shares < energy - 1e-12).sum()) + 1, len(values))


def _lora(up: Tensor, down: Tensor, bias: Tensor | None) -> StoredChange:
    tensors = {"up": up, "down": down}
    return StoredChange("lora", tensors if bias is None else tensors | {"bias": bias})


def _dense(difference: Tensor, bias: Tensor | None) -> StoredChange:
    tensors = {"weight": difference}
    return StoredChange("dense", tensors if bias is None else tensors | {"bias": bias})
