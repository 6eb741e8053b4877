"""The same change of the same layers by several hands: this package, PEFT, LyCORIS, plain autograd."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import diffadapt as da
from diffadapt.adapters.layers import ORIGINAL, LayerState
from diffadapt.adapters.targets import find_sites
from diffadapt.algebra.combined_weight import effective_bias
from diffadapt.methods import Method

PEFT = {  # name -> class of its configuration, and options
    "lora": ("LoraConfig", {}),
    "dora": ("LoraConfig", {"use_dora": True}),
    "pissa": ("LoraConfig", {"init_lora_weights": "pissa_niter_2"}),
    "vera": ("VeraConfig", {"save_projection": False}),
    "loha": ("LoHaConfig", {}),
    "lokr": ("LoKrConfig", {}),
    "hira": ("HiraConfig", {}),
}
LYCORIS = {  # name -> module, class and options
    "locon": ("locon", "LoConModule", {}),
    "locon-bypass": ("locon", "LoConModule", {"bypass_mode": True}),
    "tucker": ("locon", "LoConModule", {"use_tucker": True}),
    "tucker-bypass": ("locon", "LoConModule", {"use_tucker": True, "bypass_mode": True}),
    "dora": ("locon", "LoConModule", {"weight_decompose": True}),
    "loha": ("loha", "LohaModule", {}),
    "lokr": ("lokr", "LokrModule", {}),
    "lokr-bypass": ("lokr", "LokrModule", {"bypass_mode": True}),
}


def make(base: nn.Module, variant: str, targets: str, rank: int) -> nn.Module:
    """A copy of ``base`` that shares its weights, frozen, with an adapter on the layers ``targets``.

    ``variant`` is ``floor`` (no adapter), ``diffadapt:METHOD``, ``merged:METHOD``, ``naive:METHOD``,
    ``peft:NAME`` or ``lycoris:NAME``, where METHOD is as in ``make_method``.
    """
    model = twin(base)
    maker, _, name = variant.partition(":")
    sites = [found.site.name for found in find_sites(model, targets)]
    if maker == "floor":
        return model
    if maker == "peft":
        _attach_peft(model, name, sites, rank)
    elif maker == "lycoris":
        _attach_lycoris(model, name, sites, rank)
    else:
        adapter = model.adapter = da.attach(model, method(name, rank), targets)
        if maker == "naive":
            for layer_state in adapter.layer_states.values():
                for layer in layer_state.layers:
                    _materialise(layer, layer_state)
        elif maker == "merged":
            da.merge(adapter)
    return model


def method(name: str, rank: int) -> Method:
    """``make_method`` with this rank where the method has one and the name does not say another."""
    try:
        return da.make_method(name, rank=rank)
    except ValueError:
        return da.make_method(name)


def twin(base: nn.Module) -> nn.Module:
    """A copy of a model that owns its modules and shares every weight and buffer."""
    tensors = [*base.parameters(), *base.buffers()]
    return copy.deepcopy(base, {id(tensor): tensor for tensor in tensors}).requires_grad_(False)


def _attach_peft(model: nn.Module, name: str, sites: Sequence[str], rank: int) -> None:
    peft = importlib.import_module("peft")
    config, options = PEFT[name]
    size = {"r": 256 if name == "vera" else rank}
    if config == "LoraConfig":
        size["lora_alpha"] = rank
    if name in ("loha", "lokr"):
        size["alpha"] = rank
    config = getattr(peft, config)(target_modules=list(sites), **size, **options)
    peft.get_peft_model(model, config)  # changes the model in place


def _attach_lycoris(model: nn.Module, name: str, sites: Sequence[str], rank: int) -> None:
    module, kind, options = LYCORIS[name]
    kind = getattr(importlib.import_module(f"lycoris.modules.{module}"), kind)
    added = nn.ModuleList()
    for site in sites:
        layer = model.get_submodule(site)
        module = kind(site.replace(".", "_"), layer, lora_dim=rank, alpha=rank, **options)
        added.append(module.to(layer.weight.device))
        layer.forward = added[-1].forward
    model.adapter = added


def _materialise(layer: nn.Module, layer_state: LayerState) -> None:
    """Let autograd see the changed weight as a tensor like any other."""
    layer.__class__ = ORIGINAL[type(layer)]
    plain = copy.copy(layer)

    def forward(x: Tensor) -> Tensor:
        base, base_bias = layer_state.base(), layer_state.base_bias()
        entries = layer_state.active()
        updates = [(1.0, entry.owner.update(entry.index, base, in_forward=True)) for entry in entries]
        weight = base
        for _, update in updates:
            weight = update.weight(weight)
        bias = effective_bias(base_bias, base_bias, updates)
        own = {"weight": weight} | ({} if bias is None else {"bias": bias})
        own = {key: tensor.to(layer.weight.dtype) for key, tensor in own.items()}
        return torch.func.functional_call(plain, own, (x,))

    layer.forward = forward
