"""Every registered method with the options worth trying, and how to put it on one layer."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass, field, fields

import pytest
import torch
from helpers.layer_kinds import KINDS, MAIN, QUICK, LayerKind
from torch import Tensor, nn

import diffadapt as da
from diffadapt.adapters.targets import site_of_layer
from diffadapt.algebra.combined_weight import to_compute_dtype
from diffadapt.methods.site import Site

OPTIONS: dict[str, list[dict]] = {  # the first on every kind of layer, the others on a few
    "lora": [{"rank": 2}, {"rank": 3, "alpha": 5.0, "rank_stabilized": True}],
    "dora": [{"rank": 2, "alpha": 3.0}, {"rank": 2, "recompute": True}],
    "mora": [{"rank": 2}, {"rank": 2, "type": 6}],
    "loha": [{"rank": 1, "alpha": 2.0}, {"rank": 3}],
    "lokr": [{"rank": 2, "scale": 1.5}, {"rank": 1, "factor": 2}, {"rank": 9}],
    "flora": [
        {"rank": 3, "scale": 2.0},
        {"rank": 9, "rank_in": 2, "rank_out": 4, "kernel_rank": 1, "init": "gaussian"},
    ],
    "liera": [
        {"rank": 2, "scale": 0.5},
        {"rank": 2, "order": "exp"},
        {"rank": 1, "conv_reshape": "loralib", "order": "exp"},
        *({"rank": 2, "inner": inner} for inner in ("dora", "pissa", "flora")),
    ],
    "superlora": [
        {"rank": 1},
        {"rank": 2, "reshape": False, "scale": 1.5},
        {"rank": 2, "tensor_order": 3, "projection": "shuffle"},
        {"rank": 1, "tensor_order": 5, "core": "cp", "groups": "layer"},
        {"tensor_order": 1, "groups": 1, "rho": 0.3, "projection": "linear"},
        {"rank": 1, "kron_factors": 3, "kron_block": 2},
        {"rank": 2, "projection": "linear_v2", "rho": 0.5},
        {"rank": 2, "projection": "nonlinear", "rho": 0.5},
    ],
    "1lora": [{}, {"compression": "random"}],
    "difffit": [{}, {"gamma": False}],
}
COMBINATIONS = ["lora(rank=2)+flora(rank=3)", "1lora+lora(rank=2)+dora(rank=1)", "difffit+liera(rank=2)"]


@dataclass(frozen=True)
class Case:
    """A method by name and options."""

    spec: str
    options: dict = field(default_factory=dict, hash=False)

    @property
    def method(self):
        return da.make_method(self.spec, **self.options)

    @property
    def starts_exactly(self) -> bool:
        """Whether attaching may change no bit; renormalising methods may round."""
        return not any(word in str(self.method) for word in ("dora", "pissa"))

    def changes(self, kind: LayerKind) -> bool:
        """Whether every part of the method says it can change such a layer."""
        site = _site(kind)
        if not all(site.kind in part.kinds and part.supports(site) for part in self.method.members):
            return False
        try:
            for part in self.method.members:
                part.trained_tensors(site)
                part.shared_tensors([site])
        except ValueError:
            return False
        return True

    def __str__(self) -> str:
        return str(self.method).replace(" ", "")


@functools.cache
def _site(kind: LayerKind) -> Site:
    with torch.device("meta"):
        return site_of_layer("layer", kind.make())


def _default(name: str) -> list[dict]:
    options = {option.name for option in fields(da.METHODS[name])}
    return [{"rank": 2} if "rank" in options else {}]


def _registered(combination: str) -> bool:
    return all(part.partition("(")[0] in da.METHODS for part in combination.split("+"))


FIRST = [Case(name, OPTIONS.get(name, _default(name))[0]) for name in da.METHODS]
CASES = [Case(name, options) for name in da.METHODS for options in OPTIONS.get(name, _default(name))]
CASES += [Case(combination) for combination in COMBINATIONS if _registered(combination)]


def pairs(cases: Iterable[Case] = CASES, kinds: Iterable[str] = tuple(KINDS), *, of=KINDS) -> dict:
    """Arguments of `parametrize`: methods on the kinds of layers they can change.

    The first options of a method go on all these kinds, further ones on the three whose code they share. The
    quick loop tries the first options on two kinds.
    """
    parameters = []
    for case in cases:
        for kind in kinds:
            if not (case in FIRST or kind in MAIN) or not case.changes(of[kind]):
                continue
            is_quick = case in FIRST and kind in QUICK
            marks = () if is_quick else pytest.mark.slow
            parameters.append(pytest.param(case, of[kind], marks=marks, id=f"{case}-{kind}"))
    return {"argnames": ("case", "kind"), "argvalues": parameters}


class Model(nn.Module):
    """One layer, as a model whose state_dict one can look at."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapt(case: Case, kind: LayerKind, dtype=torch.float32, *, trained: bool = True, model=Model, **options):
    """A model of one adapted layer, the adapter, and the bare layer; trained values are random."""
    net = model(kind.layer(dtype))
    bare = copy.deepcopy(net.layer)
    adapter = da.attach(net, case.method, "layer", **options)
    if trained:
        train(adapter)
    return net, adapter, bare


@torch.no_grad()
def train(adapter: da.Adapter, size: float = 0.4, seed: int = 3) -> None:
    """Move every trained tensor away from its start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable(adapter):
        noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        parameter.add_(noise.to(parameter), alpha=size)


def trainable(adapter: da.Adapter) -> list[nn.Parameter]:
    """The tensors that are trained; an adapter may store others."""
    return [parameter for parameter in adapter.parameters() if parameter.requires_grad]


def plain(bare: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The bare layer's own forward with another weight and bias."""
    layer = copy.deepcopy(bare).to(weight.dtype)
    own = {"weight": weight}
    if bias is not None:
        layer.bias = layer.bias if layer.bias is not None else nn.Parameter(torch.zeros_like(bias))
        own["bias"] = bias
    return torch.func.functional_call(layer, own, (x,))


def changed(adapter: da.Adapter) -> tuple[Tensor, Tensor | None]:
    """The adapted weight and bias of a model with one site, as functions autograd can differentiate."""
    (layer_state,) = adapter.layer_states.values()
    base, base_bias = to_compute_dtype(layer_state.base()), layer_state.base_bias()
    weight, bias = base, None if base_bias is None else to_compute_dtype(base_bias)
    for entry in adapter.entries(layer_state):
        update = entry.owner.update(entry.index, layer_state.base())
        weight = weight + adapter.strength * (update.weight(base) - base)
        if update.bias is not None or (update.changes_bias() and base_bias is not None):
            start = base.new_zeros(base.shape[0]) if base_bias is None else to_compute_dtype(base_bias)
            change = adapter.strength * (update.bias_vector(start) - start)
            bias = change if bias is None else bias + change
    return weight, bias


def close(value: Tensor, expected: Tensor, tolerance: float) -> None:
    """Assert equality relative to the largest expected value."""
    assert value.shape == expected.shape
    error = (value.double() - expected.double()).abs().max().item()
    scale = max(expected.double().abs().max().item(), 1e-30)
    assert error <= tolerance * scale, f"relative error {error / scale:.3e} > {tolerance:.0e}"
