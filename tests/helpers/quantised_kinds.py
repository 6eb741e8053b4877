"""Small Linear layers quantised on the CPU, one of each kind that adapters know."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers.layer_kinds import LayerKind
from torch import Tensor, nn

from diffadapt.adapters.quantised_layers import QuantisedLayer

IN, OUT = 64, 96  # blocks of 32 or 64 values fill them


@dataclass(frozen=True)
class QuantisedKind(LayerKind):
    """A kind of layer whose weight is quantised.

    Attributes:
        package: What has to be installed.
        stored_as: What diffadapt calls it.
        has_bias: Whether it has a bias.
        rounds_input: Whether its product rounds the input too.
    """

    package: str = ""
    stored_as: str = ""
    has_bias: bool = True
    rounds_input: bool = False

    def layer(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The layer with reproducible weights; it computes in `dtype`.

        It is in training mode: to sample, bitsandbytes has another layout and bfloat16 on some CPUs.
        """
        torch.manual_seed(1)
        return self.make(dtype)

    def tolerance(self, exact: float = 1e-5) -> float:
        """How near its output comes to that of its dequantised weight."""
        return 0.02 if self.rounds_input else exact


def bitsandbytes_4bit(linear: nn.Linear, quant_type: str, *, nested: bool = False) -> nn.Module:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        quant_type=quant_type,
        compress_statistics=nested,
    )
    layer.load_state_dict(linear.state_dict(), strict=False)
    layer.weight = layer.weight._quantize("cpu")
    return layer


def bitsandbytes_8bit(linear: nn.Linear) -> nn.Module:
    import bitsandbytes

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # casts of the input
    layer = bitsandbytes.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
    )
    layer.load_state_dict(linear.state_dict(), strict=False)
    layer.weight = layer.weight._quantize("cpu")
    return layer


def torchao(linear: nn.Linear, config: str) -> nn.Module:
    from torchao import quantization

    model = nn.Sequential(linear)
    quantization.quantize_(model, getattr(quantization, config)())
    return model[0]


def gguf(linear: nn.Linear, quant_type: str) -> nn.Module:
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[quant_type]
    dtype = linear.weight.dtype
    layer = GGUFLinear(linear.in_features, linear.out_features, linear.bias is not None, dtype)
    data = torch.from_numpy(quants.quantize(linear.weight.detach().float().numpy(), kind))
    layer.weight = GGUFParameter(data, quant_type=kind)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach().clone())
    return layer


def _quantised(quantise: Callable[..., nn.Module], *args, bias: bool = True) -> Callable[..., nn.Module]:
    return lambda dtype: quantise(nn.Linear(IN, OUT, bias).to(dtype), *args).requires_grad_(False)


QUANTISED = {
    kind.name: kind
    for kind in (
        QuantisedKind(
            "bnb-nf4",
            _quantised(bitsandbytes_4bit, "nf4"),
            (3, IN),
            package="bitsandbytes",
            stored_as="bitsandbytes nf4",
        ),
        QuantisedKind(
            "bnb-fp4",
            _quantised(bitsandbytes_4bit, "fp4", bias=False),
            (2, 3, IN),
            package="bitsandbytes",
            stored_as="bitsandbytes fp4",
            has_bias=False,
        ),
        QuantisedKind(
            "bnb-int8",
            _quantised(bitsandbytes_8bit),
            (3, IN),
            package="bitsandbytes",
            stored_as="bitsandbytes int8",
            rounds_input=True,
        ),
        QuantisedKind(
            "torchao-int8",
            _quantised(torchao, "Int8WeightOnlyConfig"),
            (2, 3, IN),
            package="torchao",
            stored_as="torchao int8",
        ),
        QuantisedKind(
            "torchao-float8",
            _quantised(torchao, "Float8WeightOnlyConfig"),
            (3, IN),
            package="torchao",
            stored_as="torchao float8",
        ),
        QuantisedKind(
            "gguf-q8",
            _quantised(gguf, "Q8_0"),
            (2, 3, IN),
            package="gguf",
            stored_as="gguf q8_0",
        ),
        QuantisedKind(
            "gguf-q4",
            _quantised(gguf, "Q4_0", bias=False),
            (3, IN),
            package="gguf",
            stored_as="gguf q4_0",
            has_bias=False,
        ),
    )
}


def needs(kind: QuantisedKind) -> pytest.MarkDecorator:
    """Skips a test where the package of a kind is missing."""
    is_missing = importlib.util.find_spec(kind.package) is None
    return pytest.mark.skipif(is_missing, reason=f"needs {kind.package}: pip install diffadapt[quant]")


def stored_values(layer: nn.Module) -> dict[str, Tensor]:
    """Copies of every tensor that a quantised layer holds, to compare bit for bit."""
    values = {}
    for name, value in layer.state_dict().items():
        for part in getattr(value, "tensor_data_names", ()):  # of torchao
            values[f"{name}.{part}"] = getattr(value, part).clone()
        if not hasattr(value, "tensor_data_names"):
            value = value.as_tensor() if hasattr(value, "as_tensor") else value  # of GGUF
            values[name] = value.clone()
    return values


def count_dequantisations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by the name of the kind at every dequantisation of a weight."""
    calls = []
    dequantise = QuantisedLayer.dequantise

    def counted(self):
        calls.append(self.kind.name)
        return dequantise(self)

    monkeypatch.setattr(QuantisedLayer, "dequantise", counted)
    return calls


@torch.no_grad()
def dequantised(layer: nn.Module) -> nn.Linear:
    """A plain layer with the weight that a quantised one multiplies by: its outputs for unit vectors."""
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    units = torch.eye(layer.in_features)
    offset = layer(torch.zeros_like(units))
    plain.weight.copy_((layer(units).double() - offset.double()).T)
    if layer.bias is not None:
        plain.bias.copy_(layer.bias)
    return plain
