"""The layers every law is tried on: small, one of each kind a diffusion model holds."""

from collections.abc import Callable
from dataclasses import dataclass

import diffusers.models.normalization as diffusers_norms
import torch
from diffusers.models import transformers
from torch import Tensor, nn

from diffadapt.adapters.layers import is_norm


@dataclass(frozen=True)
class LayerKind:
    """How to make a layer, and the shape of an input it takes (``rows``: the input is indices below it)."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rows: int = 0

    def layer(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The layer with reproducible weights, none of them zero or one as in a fresh norm."""
        torch.manual_seed(1)
        layer = self.make()
        with torch.no_grad():
            for parameter in layer.parameters():
                if is_norm(layer):
                    parameter.uniform_(0.5, 1.5)
        return layer.to(dtype)

    def input(self, dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.rows:
            return torch.randint(self.rows, self.shape, generator=generator)
        return torch.randn(self.shape, dtype=torch.float64, generator=generator).to(dtype)


def _conv(channels_in: int, channels_out: int, kernel, **options) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(channels_in, channels_out, kernel, **options)


_IMAGE = (2, 8, 6, 5)
KINDS = {
    kind.name: kind
    for kind in (
        LayerKind("linear", lambda: nn.Linear(12, 10), (3, 12)),
        LayerKind("linear-without-bias", lambda: nn.Linear(12, 10, bias=False), (3, 12)),
        LayerKind("linear-wide-3d-input", lambda: nn.Linear(8, 15), (2, 4, 8)),
        LayerKind("linear-1d-input", lambda: nn.Linear(12, 10), (12,)),
        LayerKind("conv1d", lambda: nn.Conv1d(8, 6, 3, padding=1), (2, 8, 7)),
        LayerKind("conv-1x1", _conv(8, 12, 1), _IMAGE),
        LayerKind("conv-3x3", _conv(8, 6, 3, padding=1), _IMAGE),
        LayerKind("conv-without-bias", _conv(8, 6, 3, bias=False), _IMAGE),
        LayerKind("conv-unbatched", _conv(8, 6, 3, padding=1), _IMAGE[1:]),
        LayerKind("conv-kernel-3x2", _conv(8, 6, (3, 2), padding=(1, 0)), _IMAGE),
        LayerKind("conv-stride-2", _conv(8, 6, 3, stride=2, padding=1), _IMAGE),
        LayerKind("conv-dilation-2", _conv(8, 6, 3, padding=2, dilation=2), _IMAGE),
        LayerKind("conv-groups-2", _conv(8, 12, 3, padding=1, groups=2), _IMAGE),
        LayerKind("conv-1x1-groups-4", _conv(8, 12, 1, groups=4), _IMAGE),
        LayerKind("conv-depthwise", _conv(8, 8, 3, padding=1, groups=8), _IMAGE),
        LayerKind("conv-depthwise-multiplier-2", _conv(8, 16, 3, padding=1, groups=8), _IMAGE),
        LayerKind("conv-padding-same", _conv(8, 6, (3, 2), padding="same"), _IMAGE),
        LayerKind("conv-padding-circular", _conv(8, 6, 3, padding=1, padding_mode="circular"), _IMAGE),
        LayerKind("conv-padding-reflect", _conv(8, 6, 3, padding=(1, 2), padding_mode="reflect"), _IMAGE),
        LayerKind(
            "conv-padding-replicate-groups-2",
            _conv(8, 6, 3, stride=2, padding=1, padding_mode="replicate", groups=2),
            _IMAGE,
        ),
        LayerKind("conv3d", lambda: nn.Conv3d(4, 5, (1, 3, 2), padding=1), (2, 4, 2, 3, 3)),
        LayerKind("embedding", lambda: nn.Embedding(11, 8), (3, 4), rows=11),
        LayerKind("layer-norm", lambda: nn.LayerNorm(8), (2, 4, 8)),
        LayerKind("layer-norm-without-bias", lambda: nn.LayerNorm(8, bias=False), (2, 4, 8)),
        LayerKind("group-norm", lambda: nn.GroupNorm(2, 8), _IMAGE),
        LayerKind("rms-norm", lambda: nn.RMSNorm(8), (2, 4, 8)),
        LayerKind("diffusers-rms-norm", lambda: diffusers_norms.RMSNorm(8, eps=1e-6), (2, 4, 8)),
        LayerKind(
            "diffusers-rms-norm-with-bias", lambda: diffusers_norms.RMSNorm(8, 1e-6, bias=True), (2, 4, 8)
        ),
        LayerKind("float32-layer-norm", lambda: diffusers_norms.FP32LayerNorm(8), (2, 4, 8)),
    )
}
if hasattr(transformers, "Krea2Transformer2DModel"):  # not in the oldest supported diffusers
    from diffusers.models.transformers.transformer_krea2 import Krea2RMSNorm

    KINDS["krea2-rms-norm"] = LayerKind("krea2-rms-norm", lambda: Krea2RMSNorm(8), (2, 4, 8))
FEW = (  # one of each code path, for laws about the whole machinery
    "linear",
    "linear-without-bias",
    "conv-3x3",
    "conv-groups-2",
    "conv-depthwise",
    "embedding",
    "layer-norm",
    "group-norm",
    "rms-norm",
    "diffusers-rms-norm",
    "float32-layer-norm",
)
IN_FLOAT32 = ("diffusers-rms-norm", "float32-layer-norm")  # compute in it whatever their precision
MAIN = ("linear", "conv-3x3", "conv-groups-2")
QUICK = ("linear", "conv-3x3", "group-norm")
LARGE = {  # weights far larger than their activations and the factors of a small rank
    kind.name: kind
    for kind in (
        LayerKind("linear", lambda: nn.Linear(96, 80), (2, 96)),
        LayerKind("conv-3x3", _conv(40, 32, 3, padding=1), (1, 40, 3, 3)),
        LayerKind("conv-1x1", _conv(96, 80, 1), (1, 96, 2, 1)),
        LayerKind("conv-groups-2", _conv(80, 64, 3, padding=1, groups=2), (1, 80, 3, 3)),
    )
}
