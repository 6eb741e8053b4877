"""PEFT's methods behind diffadapt's own functions: attach, save, load, merge, strength, disabled, detach.

PEFT wraps the layers and computes the forward; the state of each layer and the file are diffadapt's. Nothing
is pickled. Source: huggingface/peft, `get_peft_model` and `get_peft_model_state_dict`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.fused_projections import FusionGuard
from diffadapt.adapters.layers import Entry, LayerState, adapted_class, layer_state_of, original_class
from diffadapt.adapters.peft_check import check_merge, check_storable, smallest_of_each_kind
from diffadapt.adapters.targets import TargetSite
from diffadapt.algebra.combined_weight import to_compute_dtype
from diffadapt.algebra.expression import Update
from diffadapt.algebra.full_rank import Dense
from diffadapt.methods.base import Method
from diffadapt.methods.site import Site

_PEFT_ERRORS = (AssertionError, AttributeError, ArithmeticError, LookupError, RuntimeError)


class PeftState(nn.Module):
    """Owns what PEFT trains in one model, and says what it does to each layer.

    The counterpart of `MethodState` for a method whose forward PEFT computes.
    """

    grouped = False

    def __init__(self, label: str, peft_model: nn.Module, adapter_name: str, sites: Sequence[Site]):
        super().__init__()
        # references, not submodules: the tensors are those of `trained` alone
        object.__setattr__(self, "peft_model", peft_model)
        object.__setattr__(self, "wrappers", ())
        object.__setattr__(self, "layer_states", ())
        self.label = label
        self.adapter_name = adapter_name
        self.sites = tuple(sites)
        self.strength = 1.0
        self.merged = False
        self.dropout_seed: int | None = None

    def set_layers(self, wrappers: Sequence[nn.Module], layer_states: Sequence[LayerState]) -> None:
        """Takes over PEFT's wrappers and the states of the layers inside, in the order of the sites."""
        object.__setattr__(self, "wrappers", tuple(wrappers))
        object.__setattr__(self, "layer_states", tuple(layer_states))
        trained = {}
        for name, parameter in self.peft_model.named_parameters():
            if parameter.requires_grad:
                trained[name.replace(".", "/")] = parameter  # the names of parameters hold no dots
        self.trained = nn.ParameterDict(trained)  # sorts by name

    @property
    def device(self) -> torch.device:
        """The device of the trained tensors."""
        return next(self.parameters()).device

    def named_tensors(self) -> dict[str, Tensor]:
        """Everything that PEFT stores of the adapter, by its name in diffadapt's file."""
        from peft import get_peft_model_state_dict

        state_dict = get_peft_model_state_dict(
            self.peft_model, adapter_name=self.adapter_name, save_embedding_layers=False
        )
        return {f"{self.label}/{key}": tensor for key, tensor in state_dict.items()}

    @torch.no_grad()
    def update(self, index: int, base: Tensor, *, in_forward: bool = False) -> Update:
        """PEFT's merged weight and bias of one site, as differences from the base's."""
        wrapper = self.copy_wrapper(index, base)
        wrapper.merge(adapter_names=[self.adapter_name])
        merged = wrapper.get_base_layer()  # another layer than before where PEFT trains a copy, as of norms
        weight_change = to_compute_dtype(merged.weight.detach()) - to_compute_dtype(base)
        base_bias = self.layer_states[index].base_bias()
        bias_change = None
        if base_bias is not None:
            bias_change = to_compute_dtype(merged.bias.detach()) - to_compute_dtype(base_bias)
        return Update(Dense(weight_change), bias=bias_change)

    def copy_wrapper(self, index: int, base: Tensor) -> nn.Module:
        """A copy of PEFT's layer around a base layer with the weight `base`, in the compute dtype."""
        layer_state = self.layer_states[index]
        # deepcopy's memo: what it holds is not copied. The layer refers to its state, a hook of it to self.
        not_copied = {id(layer_state): layer_state, id(self): self}
        wrapper = copy.deepcopy(self.wrappers[index], not_copied)
        layer = wrapper.get_base_layer()
        layer.weight = nn.Parameter(to_compute_dtype(base).clone(), requires_grad=False)
        base_bias = layer_state.base_bias()
        if base_bias is not None:
            layer.bias = nn.Parameter(to_compute_dtype(base_bias).clone(), requires_grad=False)
        return wrapper

    def without_decay(self) -> list[nn.Parameter]:
        """No tensors: PEFT's decay as they do in PEFT's own training."""
        return []

    def dropout(self, x: Tensor, index: int) -> Tensor:
        """The input itself: PEFT's forward has its own dropout."""
        return x

    def move_to(self, device: torch.device) -> None:
        """Does nothing: PEFT's tensors are in the layers, and move with them."""

    def scale_output(self, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        """A hook after PEFT's forward that applies the strength t.

        y + t (y' - y),    since every layer is linear in its weight
        """
        if self.strength == 1 and not self.merged:
            return output
        plain_output = layer.get_base_layer()(*args, **kwargs)
        if self.merged or self.strength == 0:
            return plain_output
        return plain_output + self.strength * (output - plain_output)


class PeftLayerState(LayerState):
    """The state of a layer whose active change is computed by PEFT's wrapper around it, not by the layer."""

    def active(self) -> list[Entry]:
        return [entry for entry in super().active() if not isinstance(entry.owner, PeftState)]


class PeftWrappers:
    """PEFT's wrappers in a model; `remove` takes them off, as a hook's handle does."""

    def __init__(self, root: nn.Module):
        self.root = root
        self.attributes_before = set(root.__dict__)

    def remove(self) -> None:
        """Puts the wrapped layers in their places, and deletes the attributes that PEFT gave the model."""
        for module in list(self.root.modules()):
            for name, child in list(module.named_children()):
                if _is_wrapper(child):
                    setattr(module, name, child.get_base_layer())
        for attribute in set(self.root.__dict__) - self.attributes_before:
            delattr(self.root, attribute)


def attach_peft(
    adapter: Adapter, target_sites: Sequence[TargetSite], fill: Callable[[Adapter], None] | None
) -> None:
    """Attaches an adapter whose method is one of PEFT's.

    Args:
        adapter: the adapter, which owns nothing yet.
        target_sites: the layers that it changes.
        fill: gives the tensors their values instead of PEFT's start.

    Raises:
        ValueError: PEFT cannot do it; the model is then as before.
    """
    if adapter.ranks:
        raise ValueError(f"{adapter.method.name} takes rank patterns as its own option: rank_pattern={{...}}")
    parameters = []
    for model in adapter.roots.values():
        parameters += model.parameters()
    flags = [parameter.requires_grad for parameter in parameters]
    adapter.frozen = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for root, model in adapter.roots.items():
            model_sites = [target for target in target_sites if _component(target.site, adapter) == root]
            if model_sites:
                adapter.hooks.insert(0, PeftWrappers(model))
                _attach_to_model(adapter, root, model_sites)
                adapter.hooks.append(FusionGuard(model))
        if fill is not None:
            fill(adapter)
    except BaseException:
        _remove(adapter)
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
        raise
    adapter.sites = tuple(target.site for target in target_sites)


def fill_from_file(tensors: Mapping[str, Tensor], path: object) -> Callable[[Adapter], None]:
    """A `fill` that gives PEFT's tensors the values of a file, all of them and no others.

    Args:
        tensors: the tensors of the file, by name.
        path: the file, for messages.
    """

    def fill(adapter: Adapter) -> None:
        adapter_tensors: dict[str, Tensor] = {}
        for peft_state in adapter.parts:
            adapter_tensors |= peft_state.named_tensors()
        for key, tensor in adapter_tensors.items():
            if key not in tensors or tensors[key].shape != tensor.shape:
                raise ValueError(f"{path} lacks the tensor {key!r} of shape {tuple(tensor.shape)}")
            tensor.data.copy_(tensors[key])
        for key in tensors:
            if key not in adapter_tensors:
                raise ValueError(f"{path} holds a tensor {key!r} that its method does not have")

    return fill


def _attach_to_model(adapter: Adapter, root: str, target_sites: Sequence[TargetSite]) -> None:
    """Lets PEFT wrap the layers of one model, and puts its wrappers under diffadapt's states of layers."""
    method = adapter.method
    model = adapter.roots[root]
    _check_not_quantised(method, target_sites)
    layers = []
    sites = []
    paths = []  # of the layers in this model
    layer_states = []
    for target in target_sites:
        layers.append(target.layers[0])
        sites.append(target.site)
        paths.append(target.site.name.removeprefix(f"{root}.") if root else target.site.name)
        layer_states.append(PeftLayerState(list(target.layers)))
    base_weights = [layer.weight.detach().clone() for layer in layers]
    peft_model = _wrap_layers(adapter, model, paths)
    wrappers = [model.get_submodule(path) for path in paths]

    label = f"{method.name}/{root}" if root else method.name
    peft_state = PeftState(label, peft_model, adapter.name, sites)
    for index, (site, layer) in enumerate(zip(sites, layers, strict=True)):
        wrapper = wrappers[index]
        if not _is_wrapper(wrapper) or wrapper.get_base_layer() is not layer:
            raise ValueError(f"{method.name} cannot change {site.name}; exclude it")
        # as PiSSA in PEFT, which moves the principal part of the weight into its factors
        if not torch.equal(layer.weight, base_weights[index]):
            layer.weight.data.copy_(base_weights[index])
            raise ValueError(f"{method} changes the base weights at its start, which an adapter must not")
        layer_states[index].entries.append(Entry(peft_state, index))
        adapter.layer_states[site.name] = layer_states[index]
        adapter.hooks.append(wrapper.register_forward_hook(peft_state.scale_output, with_kwargs=True))
        # the layer is adapted as with diffadapt's own methods, so that merging and reading work alike
        layer.__class__ = adapted_class(layer)
        layer._diffadapt = layer_states[index]
    peft_state.set_layers(wrappers, layer_states)

    check_storable(method, peft_state.named_tensors())
    for index in smallest_of_each_kind(layers):
        wrapper = peft_state.copy_wrapper(index, layer_states[index].base())
        check_merge(method, sites[index].name, wrapper, adapter.name)
    adapter.add_method_state(peft_state)


def _wrap_layers(adapter: Adapter, model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """Lets PEFT put its wrappers around the layers at these paths; returns PEFT's model around the model."""
    from peft import get_peft_model

    if hasattr(model, "peft_config"):
        raise ValueError("the model already has an adapter of PEFT; detach it first")
    pattern = "|".join(map(re.escape, paths))
    config = adapter.method.configuration(f"(?:{pattern})")
    # PEFT draws its starting values from torch's global generator, which must be left as it was
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(adapter.seed)
        try:
            return get_peft_model(model, config, adapter_name=adapter.name)
        except _PEFT_ERRORS as error:
            raise ValueError(f"{adapter.method}: PEFT cannot do this here: {error!r}") from error


def _check_not_quantised(method: Method, target_sites: Sequence[TargetSite]) -> None:
    for target in target_sites:
        quantised = layer_state_of(target.layers).quantised
        if quantised is not None:
            raise ValueError(
                f"{method.name} cannot change {target.site.name}, which is quantised "
                f"({quantised.kind.name}); use a method of diffadapt's own, or load the base in bfloat16"
            )


def _component(site: Site, adapter: Adapter) -> str:
    """The component of the pipeline that holds a site; empty for a bare model."""
    return "" if "" in adapter.roots else site.name.partition(".")[0]


def _remove(adapter: Adapter) -> None:
    """Takes off what was attached so far."""
    for layer_state in adapter.layer_states.values():
        for layer in layer_state.layers:
            if "_diffadapt" in layer.__dict__:
                layer.__class__ = original_class(layer)
                del layer._diffadapt
    for hook in adapter.hooks:
        hook.remove()


def _is_wrapper(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)
