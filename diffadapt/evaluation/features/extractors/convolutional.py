"""Extractors with published weight files: Inception v3 of FID, VGG16 of improved P&R, LPIPS' backbones.

Sources: FID arXiv 1706.08500; Inception Score 1606.03498; improved precision and recall 1904.06991 (fc2 after
its ReLU, 4096 numbers); LPIPS 1801.03924; sFID 2103.03841.
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

Network = Callable[[Tensor], dict[str, Tensor]]

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
INCEPTION_SIDE = 299  # pixels
VGG_SIDE = 224
LPIPS_SIDE = 256
LPIPS_BACKBONES = {  # LPIPS' name -> torchvision's, and the layers after which features are taken
    "alex": ("alexnet", (1, 4, 7, 9, 11)),
    "vgg": ("vgg16", (3, 8, 15, 22, 29)),
    "squeeze": ("squeezenet1_1", (1, 4, 7, 9, 10, 11, 12)),
}
LPIPS_SHIFT = (-0.030, -0.088, -0.188)  # of images in [-1, 1], from LPIPS' ScalingLayer
LPIPS_SCALE = (0.458, 0.448, 0.450)
LPIPS_NATIVE = "LPIPS at the images' own size, which must be the same for all (default: 256 x 256)"
SPATIAL_BLOCK = "Mixed_6d"  # whose 1 x 1 branch is `mixed_6/conv` in TensorFlow's graph
SPATIAL_CHANNELS = 7  # of its 192, in 17 x 17 places: 2023 numbers, ordered by row, column, channel


class Inception(fidelity.FeatureExtractorInceptionV3):
    """torch-fidelity's Inception v3 with our reading of weights; theirs would unpickle any object.

    Args:
        state_dict: the published weights; None: random weights, scaled so that the signal does not vanish.
    """

    def __init__(self, state_dict: dict[str, Tensor] | None):
        with patch.object(fidelity, "load_state_dict_from_url", lambda *_, **__: state_dict):
            super().__init__("inception", ["2048", "logits_unbiased"], verbose=False)

    def load_state_dict(self, state_dict: dict[str, Tensor] | None, **options: object) -> object:
        """As torch's; None draws random weights (the parent's constructor calls it)."""
        if state_dict is not None:
            return super().load_state_dict(state_dict, **options)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        return None

    def fused(self) -> Inception:
        """The same network with every normalisation folded into its convolution, channels last.

        It takes 0.7 of the time; features move by less than 1e-6 of the largest.
        """
        # W' = diag(gamma / sqrt(variance + eps)) W, b' = beta - gamma mean / sqrt(variance + eps)
        for block in self.modules():
            if isinstance(block, fidelity.BasicConv2d):
                block.conv = fuse_conv_bn_eval(block.conv, block.bn)
                block.bn = nn.Identity()
        return self.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor, *, symmetric: bool = False) -> dict[str, Tensor]:
        """The layers "pool", "logits_unbiased" and "spatial".

        Args:
            pixels: (B, 3, 299, 299) in [0, 255].
            symmetric: scale to exactly [-1, 1], as pytorch-fid and PIQ do; else as TensorFlow's graph does.
        """
        x = pixels / 127.5 - 1 if symmetric else (pixels - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        blocks = list(self.named_children())[:-2]  # all but AvgPool and fc
        for name, block in blocks:
            if name == SPATIAL_BLOCK:
                branch = block.branch1x1(x)[:, :SPATIAL_CHANNELS]  # (B, 7, 17, 17)
                spatial = branch.permute(0, 2, 3, 1).flatten(1)  # (B, 2023)
            x = block(x)
        pool = self.AvgPool(x).flatten(1)  # (B, 2048)
        logits = pool.mm(self.fc.weight.T)  # (B, 1008), without the bias
        return {"pool": pool, "logits_unbiased": logits, "spatial": spatial}


def inception(path: Path | None, *, sha256: str, preset: str | None, device: str) -> Extractor:
    """Inception v3: layers "pool" (2048) and "logits_unbiased" (1008); default resize `tf1`.

    On request "spatial" (2023): the features of sFID as ADM's evaluator takes them.

    Args:
        path: the weight file; None: random weights.
        sha256: of the weights.
        preset: of the resize; None: the default.
        device: of the network.
    """
    model = frozen(Inception(_read_weights(path)), device).fused()
    network = partial(model, symmetric=preset == "bilinear")
    return Extractor(
        name="inception",
        sha256=sha256,
        side=INCEPTION_SIDE,
        preset=preset or "tf1",
        layers=("pool", "logits_unbiased"),
        feature_layer="pool",
        network=_on_device(network, device),
        logit_layer="logits_unbiased",
        role_layers={"spatial": "spatial"},
        smoke=path is None,
    )


def vgg16(path: Path | None, *, sha256: str, preset: str | None, device: str) -> Extractor:
    """VGG16: layer "fc2_relu" (4096); default resize `tf1`. Arguments as for `inception`."""
    model = frozen(_torchvision_model("vgg16", _read_weights(path)), device)
    model = model.to(memory_format=torch.channels_last)

    def network(pixels: Tensor) -> dict[str, Tensor]:
        x = standardise(pixels, **IMAGENET).contiguous(memory_format=torch.channels_last)
        x = model.avgpool(model.features(x)).flatten(1)
        return {"fc2_relu": model.classifier[:5](x)}  # (B, 4096), up to the second ReLU

    return Extractor(
        name="vgg16",
        sha256=sha256,
        side=VGG_SIDE,
        preset=preset or "tf1",
        layers=("fc2_relu",),
        feature_layer="fc2_relu",
        network=_on_device(network, device),
        smoke=path is None,
    )


def lpips_preset(name: str, is_native: bool, preset: str | None = None) -> str | None:
    """The resize preset of an extractor: `none` for LPIPS of images at their own size, else `preset`."""
    return "none" if is_native and name.startswith("lpips:") else preset


def lpips(path: Path | None, *, backbone: str, sha256: str, preset: str | None, device: str) -> Extractor:
    """LPIPS: layer "lpips", in which squared distances are LPIPS; default resize `clean`.

    With a_l and b_l the features of two images after layer l, of unit length over channels, P_l places and
    weights w_l >= 0 of the channels,

        LPIPS(a, b) = sum_l 1/P_l sum_places w_l . (a_l - b_l)^2
                    = |x(a) - x(b)|^2,    x(a) = concatenation over l of sqrt(w_l / P_l) a_l

    Args:
        path: the weight file of the backbone; None: random weights.
        backbone: a key of LPIPS_BACKBONES.
        sha256: of the backbone's weights.
        preset: of the resize; None: the default.
        device: of the network.
    """
    model_name, taps = LPIPS_BACKBONES[backbone]
    backbone_layers = frozen(_torchvision_model(model_name, _read_weights(path)).features, device)
    head_file = Path(torchmetrics.functional.image.__file__).parent / "lpips_models" / f"{backbone}.pth"
    heads = read_state_dict(head_file)
    weight_of = {}  # layer -> w, (1, C, 1, 1)
    for index, tap in enumerate(taps):
        weight_of[tap] = heads[f"lin{index}.model.1.weight"].to(device)
    shift = torch.tensor(LPIPS_SHIFT, device=device).view(1, 3, 1, 1)
    scale = torch.tensor(LPIPS_SCALE, device=device).view(1, 3, 1, 1)

    def network(pixels: Tensor) -> dict[str, Tensor]:
        x = (pixels / 127.5 - 1 - shift) / scale
        rows = []
        for index, layer in enumerate(backbone_layers[: taps[-1] + 1]):
            x = layer(x)  # (B, C, H, W)
            if index in weight_of:
                unit = x / (1e-8 + x.square().sum(1, keepdim=True)).sqrt()  # a_l, of length 1 over channels
                places = x.shape[-2] * x.shape[-1]  # P_l
                rows.append(((weight_of[index] / places).sqrt() * unit).flatten(1))  # (B, C * H * W)
        return {"lpips": torch.cat(rows, dim=1)}

    return Extractor(
        name=f"lpips:{backbone}",
        sha256=f"{sha256} and {hash_tensors(heads)}",
        side=LPIPS_SIDE,
        preset=preset or "clean",
        layers=("lpips",),
        feature_layer=None,
        network=_on_device(network, device),
        perceptual_layer="lpips",
        smoke=path is None,
    )


def _read_weights(path: Path | None) -> dict[str, Tensor] | None:
    return None if path is None else read_state_dict(path)


def _torchvision_model(name: str, state_dict: dict[str, Tensor] | None) -> nn.Module:
    """A model of torchvision with these weights; None: random ones."""
    build = getattr(torchvision.models, name)
    if state_dict is None:
        return build(weights=None)
    with torch.device("meta"):  # no time is spent on weights that are replaced
        model = build(weights=None)
    model.load_state_dict(state_dict, assign=True)
    return model


def _on_device(network: Network, device: str) -> Network:
    """The network on pixels that are moved to its device first."""
    return lambda pixels: network(pixels.to(device))
