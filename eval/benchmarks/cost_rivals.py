"""The same methods on the same layers by this package, PEFT, LyCORIS and plain autograd."""

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
    """A frozen copy of `base` that shares its weights, with an adapter.

    Args:
        base: the model.
        variant: `floor` (no adapter), `diffadapt:METHOD`, `merged:METHOD`, `naive:METHOD` (in plain
            autograd), `peft:NAME` or `lycoris:NAME`, METHOD as for `make_method`.
        targets: adapted layers.
        rank: of the adapter, where the method has one.
    """
    model = shallow_copy(base)
    maker, _, name = variant.partition(":")
    layer_names = [match.site.name for match in find_sites(model, targets)]
    if maker == "floor":
        return model
    if maker == "peft":
        _attach_peft(model, name, layer_names, rank)
    elif maker == "lycoris":
        _attach_lycoris(model, name, layer_names, rank)
    else:
        adapter = da.attach(model, make_method(name, rank), targets)
        model.adapter = adapter
        if maker == "naive":
            for layer_state in adapter.layer_states.values():
                for layer in layer_state.layers:
                    _use_plain_autograd(layer, layer_state)
        elif maker == "merged":
            da.merge(adapter)
    return model


def make_method(name: str, rank: int) -> Method:
    """The method with this rank, unless it has none or its name gives another."""
    try:
        return da.make_method(name, rank=rank)
    except ValueError:
        return da.make_method(name)


def shallow_copy(base: nn.Module) -> nn.Module:
    """A frozen copy of a model with its own modules, which share every weight and buffer."""
    tensors = [*base.parameters(), *base.buffers()]
    return copy.deepcopy(base, {id(tensor): tensor for tensor in tensors}).requires_grad_(False)


def _attach_peft(model: nn.Module, name: str, layer_names: Sequence[str], rank: int) -> None:
    peft = importlib.import_module("peft")
    config_name, options = PEFT[name]
    size = {"r": 256 if name == "vera" else rank}  # PEFT's default of VeRA
    if config_name == "LoraConfig":
        size["lora_alpha"] = rank
    if name in ("loha", "lokr"):
        size["alpha"] = rank
    config = getattr(peft, config_name)(target_modules=list(layer_names), **size, **options)
    peft.get_peft_model(model, config)  # changes the model in place


def _attach_lycoris(model: nn.Module, name: str, layer_names: Sequence[str], rank: int) -> None:
    module_name, class_name, options = LYCORIS[name]
    module_class = getattr(importlib.import_module(f"lycoris.modules.{module_name}"), class_name)
    modules = nn.ModuleList()
    for layer_name in layer_names:
        layer = model.get_submodule(layer_name)
        module = module_class(layer_name.replace(".", "_"), layer, lora_dim=rank, alpha=rank, **options)
        module.to(layer.weight.device)
        modules.append(module)
        layer.forward = module.forward
    model.adapter = modules


def _use_plain_autograd(layer: nn.Module, layer_state: LayerState) -> None:
    """Makes an adapted layer compute its changed weight as a tensor that autograd records."""
    layer.__class__ = ORIGINAL[type(layer)]
    plain_layer = copy.copy(layer)

    def forward(x: Tensor) -> Tensor:
        base_weight = layer_state.base()
        base_bias = layer_state.base_bias()
        updates = []
        weight = base_weight
        for entry in layer_state.active():
            update = entry.owner.update(entry.index, base_weight, in_forward=True)
            updates.append((1.0, update))
            weight = update.weight(weight)
        bias = effective_bias(base_bias, base_bias, updates)
        parameters = {"weight": weight.to(layer.weight.dtype)}
        if bias is not None:
            parameters["bias"] = bias.to(layer.weight.dtype)
        return torch.func.functional_call(plain_layer, parameters, (x,))

    layer.forward = forward
