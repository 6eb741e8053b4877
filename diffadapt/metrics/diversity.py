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
    """LPIPS (arXiv 1801.03924): distance of two images in a network's features, torchmetrics' version."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two batches (B, 3, H, W) in [0, 1] -> (B,)."""
        return self.network(first, second, normalize=True).flatten()


def load_lpips(state_dict: Mapping[str, Tensor], *, net: str = "alex") -> Lpips:
    """LPIPS on the weights of torchvision's alexnet, vgg16 or squeezenet1_1; the heads are torchmetrics'.

    Args:
        state_dict: of the whole torchvision model, or of its features.
        net: alex, vgg or squeeze.

    Raises:
        ValueError: the backbone is unknown, or the weights are of another one; names the first missing.
    """
    if net not in BACKBONES:
        raise ValueError(f"net={net!r}: expected one of {', '.join(BACKBONES)}")
    from torchmetrics.functional.image.lpips import _LPIPS as TorchmetricsLpips  # slow to import

    network = TorchmetricsLpips(net=net, pnet_rand=True).eval().requires_grad_(False)
    backbone_state = {}
    for key, tensor in network.net.state_dict().items():
        source = re.sub(r"^slice(s\.)?\d+\.", "features.", key)  # torchmetrics cuts the layers into slices
        if source not in state_dict or state_dict[source].shape != tensor.shape:
            raise ValueError(f"weights of {net!r} need {source} of shape {tuple(tensor.shape)}")
        backbone_state[key] = state_dict[source]
    network.net.load_state_dict(backbone_state)
    return Lpips(network)


def lpips_diversity(*, pixels: Tensor, groups: Sequence | Tensor, network: Distance) -> float:
    """Mean distance between two images of one prompt, over its pairs, then over the prompts.

    Higher is more diverse.

    Args:
        pixels: (N, 3, H, W), uint8 or floating point in [0, 1].
        groups: (N,) the prompt (and subject) of each image.
        network: the distance, such as `load_lpips` returns.

    Raises:
        ValueError: no prompt has two images.
    """
    values = list(group_distances(pixels=pixels, groups=groups, network=network).values())
    return sum(values) / len(values)


def lpips_diversity_with_interval(
    *, pixels: Tensor, groups: Sequence | Tensor, network: Distance, seed: int = 0
) -> Estimate:
    """`lpips_diversity` and its interval over prompts; no interval for a single prompt."""
    distances = group_distances(pixels=pixels, groups=groups, network=network)
    values = torch.tensor(list(distances.values()), dtype=torch.float64)  # (prompts,)
    interval = None
    if len(values) > 1:
        interval = clustered_interval(values, list(distances), over="prompts", seed=seed, low=0.0)
    return Estimate(float(values.mean()), interval)


def group_distances(*, pixels: Tensor, groups: Sequence | Tensor, network: Distance) -> dict[object, float]:
    """Mean distance over the pairs of each prompt; prompts with one image are left out.

    Returns:
        Prompt -> distance.

    Raises:
        ValueError: no prompt has two images.
    """
    names = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if len(names) != len(pixels):
        raise ValueError(f"{len(pixels)} images, but prompts of {len(names)}")
    members: dict[object, list[int]] = {}
    for row, name in enumerate(names):
        members.setdefault(name, []).append(row)
    mean_distances = {}
    for name, rows in members.items():
        if len(rows) > 1:
            pairs = torch.tensor(list(combinations(rows, 2)))  # (pairs, 2)
            distances = []
            for some_pairs in pairs.split(PAIRS):
                first = _in_unit_range(pixels[some_pairs[:, 0]])
                second = _in_unit_range(pixels[some_pairs[:, 1]])
                distances.append(network(first, second).double())
            mean_distances[name] = float(torch.cat(distances).mean())
    if not mean_distances:
        raise ValueError("diversity needs at least two images of one prompt; every prompt has one")
    return mean_distances


def _in_unit_range(pixels: Tensor) -> Tensor:
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
