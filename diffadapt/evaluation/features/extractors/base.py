"""What an extractor must offer: `Extractor`, and how to add one.

An extractor turns images into features: one vector per image and layer. To add one,

- without touching this package, write a class that keeps `CONTRACT` below and name it `module:Class`
  wherever an extractor is named; `custom.py` wraps it;
- as part of the package, write a function that returns an `Extractor` (in `convolutional.py` for published
  weight files, in `transformer.py` for models in the format of transformers) and call it in `__init__.py`.
  A published weight file also needs an entry in `weight_files.FILES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from diffadapt.evaluation.record import ExtractorSummary
from diffadapt.metrics.resize import resize

DTYPE = "float32"  # of networks and of stored features
CONTRACT = (
    "it is constructed without arguments, has an integer `side`, and is called with (B, 3, side, side) "
    "float32 in [0, 255]; it returns (B, D), or a dictionary of such tensors, with the attributes `features` "
    "(the key of the layer for distances) and, for the Inception Score, `logits` (a key); `preset` names its "
    "resize (default: `clean`)"
)


@dataclass(frozen=True)
class Extractor:
    """A frozen network with its preprocessing.

    Metrics name what they read by roles (`diffadapt.metrics.feature_set.ROLES`); the `..._layer` fields and
    `role_layers` say which layer serves which role. A metric whose role has no layer is not computed.

    Attributes:
        name: "inception", "clip:NAME", "embedded:digits", "package.module:Class", ...
        sha256: of its weights; part of every score's identity.
        side: height and width that the network takes, in pixels.
        preset: of the resize (`diffadapt.metrics.resize`).
        layers: the outputs of one forward, each (B, D) float32.
        feature_layer: for distances and neighbours; None where there is none.
        network: (B, 3, side, side) float32 in [0, 255] -> layer -> (B, D).
        logit_layer: class scores for the Inception Score; None where there are none.
        perceptual_layer: the layer in which squared distances are LPIPS; None where there is none.
        embed_texts: captions -> (N, D) in the space of `feature_layer`; None without a text encoder.
        text_length: tokens that the text encoder reads; None without one.
        count_tokens: texts -> tokens of each before truncation; None without a text encoder.
        role_layers: role -> layer, for roles without a field above ("unit", "raw", "spatial", ...). A layer
            that is not in `layers` is computed only on request; see `with_layers_for`.
        smoke: whether the weights are random, in which case nothing computed with them is a score.
    """

    name: str
    sha256: str
    side: int
    preset: str
    layers: tuple[str, ...]
    feature_layer: str | None
    network: Callable[[Tensor], dict[str, Tensor]]
    logit_layer: str | None = None
    perceptual_layer: str | None = None
    embed_texts: Callable[[Sequence[str]], Tensor] | None = None
    text_length: int | None = None
    count_tokens: Callable[[Sequence[str]], list[int]] | None = None
    role_layers: Mapping[str, str] = field(default_factory=dict)
    smoke: bool = False

    @property
    def is_perceptual(self) -> bool:
        """Whether it is an LPIPS, which compares generated images of one prompt among themselves alone."""
        return self.perceptual_layer is not None

    def layer_of(self, role: str) -> str | None:
        """The layer that serves a role; None where there is none."""
        if role == "features":
            return self.feature_layer
        if role == "logits":
            return self.logit_layer
        if role == "pixels":
            return self.perceptual_layer
        if role == "unit":  # cosines do not depend on the length of the features
            return self.role_layers.get("unit", self.feature_layer)
        return self.role_layers.get(role)

    def with_layers_for(self, roles: Sequence[str]) -> Extractor:
        """The same extractor, which also computes the layers that serve these roles."""
        requested = [self.role_layers[role] for role in roles if role in self.role_layers]
        return replace(self, layers=tuple(dict.fromkeys([*self.layers, *requested])))

    def prepare(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, 3, side, side) float32 in [0, 255]."""
        return resize(images, self.side, self.preset)

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Prepared images -> layer -> (B, D) float32 on the CPU."""
        outputs = self.network(pixels)  # may hold layers that were not asked for
        return {layer: outputs[layer].float().cpu() for layer in self.layers}

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) uint8 -> layer -> (B, D) float32."""
        return self.forward(self.prepare(images))

    @property
    def summary(self) -> ExtractorSummary:
        """The extractor as records name it."""
        return ExtractorSummary(
            self.name, self.sha256, self.preset, self.side, self.layers, DTYPE, smoke=self.smoke
        )


def frozen(network: nn.Module, device: str | torch.device) -> nn.Module:
    """The network in eval mode, without gradients, on a device."""
    return network.requires_grad_(False).eval().to(device)


def standardise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels of zero mean and unit deviation per channel.

    Args:
        pixels: (B, 3, H, W) in [0, 255].
        mean: of each channel, of values in [0, 1].
        std: of each channel, of values in [0, 1].
    """
    shift = pixels.new_tensor(mean).view(1, 3, 1, 1) * 255
    scale = pixels.new_tensor(std).view(1, 3, 1, 1) * 255
    return (pixels - shift) / scale
