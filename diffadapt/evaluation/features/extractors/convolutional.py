"""Extractors with published weight files: Inception v3 of FID, VGG16 of improved P&R, LPIPS' backbones.

Sources: FID arXiv 1706.08500; Inception Score 1606.03498; improved precision and recall 1904.06991 (fc2 after
its ReLU, 4096 numbers); LPIPS 1801.03924.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity
import torchmetrics.functional.image
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from diffadapt.common.safetensors_file import hash_tensors
from diffadapt.evaluation.features.extractors.base import Extractor, frozen, standardise
from diffadapt.evaluation.features.weight_files import read_state_dict

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
LPIPS = {  # backbone -> its layers in torchvision after which features are taken
    "alex": ("alexnet", (1, 4, 7, 9, 11)),
    "vgg": ("vgg16", (3, 8, 15, 22, 29)),
    "squeeze": ("squeezenet1_1", (1, 4, 7, 9, 10, 11, 12)),
}
LPIPS_SIDE = 256  # pixels
LPIPS_NATIVE = "LPIPS of the images at their own size, which must be one (default: resized to 256 x 256)"
SPATIAL_BLOCK = "Mixed_6d"  # whose 1 x 1 branch is `mixed_6/conv` in TensorFlow's graph
SPATIAL_CHANNELS = 7  # of its 192, in 17 x 17 places: 2023 numbers, ordered by row, column, channel


class Inception(fidelity.FeatureExtractorInceptionV3):
    """torch-fidelity's network; its own way of reading weights would unpickle anything, so it is not used.

    Without a state the weights are random, of a size that keeps the signal alive through all layers.
    """

    def __init__(self, state: dict[str, Tensor] | None):
        with patch.object(fidelity, "load_state_dict_from_url", lambda *_, **__: state):
            super().__init__("inception", ["2048", "logits_unbiased"], verbose=False)

    def load_state_dict(self, state: dict[str, Tensor] | None, **options: object) -> object:
        if state is not None:
            return super().load_state_dict(state, **options)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        return None

    def fused(self) -> Inception:
        """Itself with every normalisation folded into its convolution, channels last: 0.7 of the time.

        Features move by less than 1e-6 of the largest.
        """
        for block in self.modules():
            if isinstance(block, fidelity.BasicConv2d):
                block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
        return self.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor, *, symmetric: bool = False) -> dict[str, Tensor]:
        """Scaled as TensorFlow's graph does it; symmetric: to exactly [-1, 1], as pytorch-fid and PIQ do."""
        x = pixels / 127.5 - 1 if symmetric else (pixels - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        for name, layer in list(self.named_children())[:-2]:  # all but AvgPool and fc
            if name == SPATIAL_BLOCK:
                spatial = layer.branch1x1(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
            x = layer(x)
        pool = self.AvgPool(x).flatten(1)
        return {"pool": pool, "logits_unbiased": pool.mm(self.fc.weight.T), "spatial": spatial}


def inception(path: Path | None, *, sha256: str, preset: str | None, device: str) -> Extractor:
    """Layers "pool" (2048) and "logits_unbiased" (1008); resize `tf1` unless told otherwise.

    When asked for "spatial" (2023): the features of sFID (arXiv 2103.03841) as ADM's evaluator takes them.
    """
    model = frozen(Inception(_state(path)), device).fused()
    network = partial(model, symmetric=preset == "bilinear")
    layers = ("pool", "logits_unbiased")
    return Extractor(
        "inception",
        sha256,
        299,
        preset or "tf1",
        layers,
        "pool",
        _on(device, network),
        layers[1],
        roles={"spatial": "spatial"},
        smoke=path is None,
    )


def vgg16(path: Path | None, *, sha256: str, preset: str | None, device: str) -> Extractor:
    """Layer "fc2_relu" (4096); resize `tf1` unless told otherwise."""
    model = frozen(_torchvision("vgg16", _state(path)), device).to(memory_format=torch.channels_last)

    def network(pixels: Tensor) -> dict[str, Tensor]:
        x = standardise(pixels, **IMAGENET).contiguous(memory_format=torch.channels_last)
        x = model.avgpool(model.features(x)).flatten(1)
        return {"fc2_relu": model.classifier[:5](x)}

    return Extractor(
        "vgg16",
        sha256,
        224,
        preset or "tf1",
        ("fc2_relu",),
        "fc2_relu",
        _on(device, network),
        smoke=path is None,
    )


def lpips_preset(name: str, is_native: bool, preset: str | None = None) -> str | None:
    """The resize of an extractor of some name: none for LPIPS of images at their own size."""
    return "none" if is_native and name.startswith("lpips:") else preset


def lpips(path: Path | None, *, kind: str, sha256: str, preset: str | None, device: str) -> Extractor:
    """Layer "lpips": the squared distance between two vectors is the LPIPS of their images.

    LPIPS sums over layers the mean over places of w . (a - b)^2, a and b of unit length over channels and
    w >= 0: the squared distance of sqrt(w / places) * a and sqrt(w / places) * b, all written in one row.
    """
    name, taps = LPIPS[kind]
    features = frozen(_torchvision(name, _state(path)).features, device)
    heads = Path(torchmetrics.functional.image.__file__).parent / "lpips_models" / f"{kind}.pth"
    stored = read_state_dict(heads)
    weights = [stored[f"lin{i}.model.1.weight"].to(device) for i in range(len(taps))]  # each (1, C, 1, 1)
    shift = torch.tensor([-0.030, -0.088, -0.188], device=device).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], device=device).view(1, 3, 1, 1)

    def network(pixels: Tensor) -> dict[str, Tensor]:
        x, rows = (pixels / 127.5 - 1 - shift) / scale, []
        for index, layer in enumerate(features[: taps[-1] + 1]):
            x = layer(x)
            if index in taps:
                unit = x / (1e-8 + x.square().sum(1, keepdim=True)).sqrt()
                places = x.shape[-2] * x.shape[-1]
                rows.append(((weights[taps.index(index)] / places).sqrt() * unit).flatten(1))
        return {"lpips": torch.cat(rows, dim=1)}

    return Extractor(
        f"lpips:{kind}",
        f"{sha256} and {hash_tensors(stored)}",
        LPIPS_SIDE,
        preset or "clean",
        ("lpips",),
        None,
        _on(device, network),
        perceptual="lpips",
        smoke=path is None,
    )


def _state(path: Path | None) -> dict[str, Tensor] | None:
    return None if path is None else read_state_dict(path)


def _torchvision(name: str, state: dict[str, Tensor] | None) -> nn.Module:
    build = getattr(torchvision.models, name)
    if state is None:
        return build(weights=None)
    with torch.device("meta"):
        model = build(weights=None)
    model.load_state_dict(state, assign=True)
    return model


def _on(device: str, network: Callable[[Tensor], dict[str, Tensor]]) -> Callable[[Tensor], dict[str, Tensor]]:
    return lambda pixels: network(pixels.to(device))
