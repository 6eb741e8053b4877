"""Diversity of the images of one prompt: mean LPIPS between them (DreamBooth, arXiv 2208.12242, 4.1, DIV)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from diffadapt.metrics.intervals import Estimate, clustered_interval

Distance = Callable[[Tensor, Tensor], Tensor]  # two batches (B, 3, H, W) in [0, 1] -> (B,)
PAIRS = 16  # pairs of images measured at a time
BACKBONES = ("alex", "vgg", "squeeze")


class Lpips(nn.Module):
    """Distance of two images in a network's features (LPIPS, arXiv 1801.03924), torchmetrics' with its
    heads."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two batches (B, 3, H, W) in [0, 1] -> (B,)."""
        return self.network(first, second, normalize=True).flatten()


def load_lpips(state_dict: Mapping[str, Tensor], *, net: str = "alex") -> Lpips:
    """LPIPS on the weights of torchvision's alexnet, vgg16 or squeezenet1_1; the heads are torchmetrics'.

    Raises: ValueError for an unknown backbone, or weights of another one, naming the first missing.
    """
    if net not in BACKBONES:
        raise ValueError(f"net={net!r}: expected one of {', '.join(BACKBONES)}")
    from torchmetrics.functional.image.lpips import _LPIPS as TorchmetricsLpips  # slow, needed here alone

    network = TorchmetricsLpips(net=net, pnet_rand=True).eval().requires_grad_(False)
    own = network.net.state_dict()
    found = {}
    for key, tensor in own.items():
        source = re.sub(r"^slice(s\.)?\d+\.", "features.", key)
        if source not in state_dict or state_dict[source].shape != tensor.shape:
            raise ValueError(f"weights of {net!r} need {source} of shape {tuple(tensor.shape)}")
        found[key] = state_dict[source]
    network.net.load_state_dict(found)
    return Lpips(network)


def lpips_diversity(*, pixels: Tensor, groups: Sequence | Tensor, network: Distance) -> float:
    """Mean distance between two images of one prompt, over its pairs, then over the prompts; higher is
    better.

    Args:
        pixels: (N, 3, H, W), uint8 or floating point in [0, 1].
        groups: (N,) the prompt (and subject) of each image.
        network: such as `load_lpips` gives.
    Raises: ValueError when no prompt has two images.
    """
    values = list(group_distances(pixels=pixels, groups=groups, network=network).values())
    return sum(values) / len(values)


def lpips_diversity_with_interval(
    *, pixels: Tensor, groups: Sequence | Tensor, network: Distance, seed: int = 0
) -> Estimate:
    """`lpips_diversity` and its interval over prompts; no interval for a single prompt."""
    found = group_distances(pixels=pixels, groups=groups, network=network)
    values = torch.tensor(list(found.values()), dtype=torch.float64)
    several = len(values) > 1
    return Estimate(
        float(values.mean()),
        clustered_interval(values, list(found), over="prompts", seed=seed, low=0.0) if several else None,
    )


def group_distances(*, pixels: Tensor, groups: Sequence | Tensor, network: Distance) -> dict[object, float]:
    """prompt -> mean distance over its pairs; prompts with one image are left out."""
    names = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if len(names) != len(pixels):
        raise ValueError(f"{len(pixels)} images, but prompts of {len(names)}")
    members: dict[object, list[int]] = {}
    for row, name in enumerate(names):
        members.setdefault(name, []).append(row)
    found = {}
    for name, rows in members.items():
        if len(rows) > 1:
            first, second = torch.tensor(list(combinations(rows, 2))).T
            parts = [
                network(_unit(pixels[i]), _unit(pixels[j])).double()
                for i, j in zip(first.split(PAIRS), second.split(PAIRS), strict=True)
            ]
            found[name] = float(torch.cat(parts).mean())
    if not found:
        raise ValueError("diversity needs at least two images of one prompt; every prompt has one")
    return found


def _unit(pixels: Tensor) -> Tensor:
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
