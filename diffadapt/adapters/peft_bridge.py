"""PEFT's methods behind the calls of our own: attach, save, load, merge, strength, disabled, detach.

PEFT wraps the layers and computes the forward; the state of each layer and the file are ours. Nothing is
pickled. Source: huggingface/peft, ``get_peft_model`` and ``get_peft_model_state_dict``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.fused_projections import FusingRefused
from diffadapt.adapters.layers import ADAPTED, ORIGINAL, Entry, LayerState
from diffadapt.adapters.peft_check import check_merge, check_storable, smallest_of_each_kind
from diffadapt.adapters.targets import TargetSite
from diffadapt.algebra.combined_weight import to_compute_dtype
from diffadapt.algebra.expression import Update
from diffadapt.algebra.full_rank import Dense
from diffadapt.methods.peft_config import PeftMethod
from diffadapt.methods.site import Site


class PeftPart(nn.Module):
    """Owns what PEFT trains in one model, and says what it does to each layer."""

    def __init__(self, label: str, wrapped: nn.Module, adapter_name: str, sites: Sequence[Site]):
        super().__init__()
        object.__setattr__(self, "wrapped", wrapped)  # PEFT's model around ours: a reference, not a submodule
        self.label, self.adapter_name, self.sites = label, adapter_name, tuple(sites)
        self.strength, self.merged, self.grouped = 1.0, False, False
        self.dropout_seed: int | None = None
        self.layers: tuple[nn.Module, ...] = ()
        object.__setattr__(self, "layer_states", [])

    def own(self, layers: Sequence[nn.Module], layer_states: Sequence[LayerState]) -> None:
        """Take charge of PEFT's layers, in the order of the sites."""
        object.__setattr__(self, "layers", tuple(layers))
        object.__setattr__(self, "layer_states", list(layer_states))
        trained = [(name, p) for name, p in self.wrapped.named_parameters() if p.requires_grad]
        self.trained = nn.ParameterDict({name.replace(".", "/"): value for name, value in trained})

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def named_tensors(self) -> dict[str, Tensor]:
        """Everything PEFT stores of the adapter, by its name in our file."""
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(
            self.wrapped, adapter_name=self.adapter_name, save_embedding_layers=False
        )
        return {f"{self.label}/{key}": tensor for key, tensor in state.items()}

    @torch.no_grad()
    def update(self, index: int, base: Tensor, *, in_forward: bool = False) -> Update:
        """PEFT's merged weight and bias, as differences."""
        wrapper, bias = self.copy_of(index, base), self.layer_states[index].base_bias()
        wrapper.merge(adapter_names=[self.adapter_name])
        merged = wrapper.get_base_layer()  # another layer than before where PEFT trains a copy, as of norms
        change = None if bias is None else to_compute_dtype(merged.bias.detach()) - to_compute_dtype(bias)
        return Update(Dense(to_compute_dtype(merged.weight.detach()) - to_compute_dtype(base)), bias=change)

    def copy_of(self, index: int, base: Tensor) -> nn.Module:
        """PEFT's layer again, around a base layer with the weight ``base``, wide."""
        layer, layer_state = self.layers[index], self.layer_states[index]
        shared = {id(layer_state): layer_state, id(self): self}  # a hook of the layer names this part
        wrapper = copy.deepcopy(layer, shared)
        inner, bias = wrapper.get_base_layer(), layer_state.base_bias()
        inner.weight = nn.Parameter(to_compute_dtype(base).clone(), requires_grad=False)
        if bias is not None:
            inner.bias = nn.Parameter(to_compute_dtype(bias).clone(), requires_grad=False)
        return wrapper

    def without_decay(self) -> list[nn.Parameter]:
        """None: PEFT's tensors decay as they do in PEFT's own training."""
        return []

    def dropout(self, x: Tensor, index: int) -> Tensor:
        return x

    def move_to(self, device: torch.device) -> None:
        """PEFT's tensors lie in the layers, and move with them."""

    def at_strength(self, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        """A hook after PEFT's forward: ``y + t (y' - y)``, since every layer is linear in its weight."""
        if self.strength == 1 and not self.merged:
            return output
        plain = layer.get_base_layer()(*args, **kwargs)
        return plain if self.merged or self.strength == 0 else plain + self.strength * (output - plain)


class PeftLayerState(LayerState):
    """A layer whose live change is computed by PEFT's wrapper around it, not by the layer."""

    def active(self) -> list[Entry]:
        return [entry for entry in super().active() if not isinstance(entry.owner, PeftPart)]


class Wrapped:
    """The wrappers in a model; ``remove`` takes them off, as a hook's handle does."""

    def __init__(self, root: nn.Module):
        self.root, self.before = root, set(root.__dict__)

    def remove(self) -> None:
        for module in list(self.root.modules()):
            for name, child in list(module.named_children()):
                if _is_wrapper(child):
                    setattr(module, name, child.get_base_layer())
        for added in set(self.root.__dict__) - self.before:
            delattr(self.root, added)


def attach_peft(
    roots: Mapping[str, nn.Module],
    method: PeftMethod,
    found: Sequence[TargetSite],
    *,
    name: str,
    seed: int,
    ranks: Mapping[str, int],
    fill: Callable[[Adapter], None] | None = None,
) -> Adapter:
    """``attaching.attach_sites`` for a method of PEFT. Raises ValueError; the model is then as before."""
    if ranks:
        raise ValueError(f"{method.name} takes rank patterns as its own option: rank_pattern={{...}}")
    adapter = Adapter(name, method, seed, {}, dict(roots))
    adapter.frozen = [p for root in roots.values() for p in root.parameters() if p.requires_grad]
    flags = [(p, p.requires_grad) for root in roots.values() for p in root.parameters()]
    try:
        for root, module in roots.items():
            own = [choice for choice in found if not root or choice.site.name.startswith(f"{root}.")]
            if own:
                adapter.hooks.insert(0, Wrapped(module))
                _wrap(adapter, method, root, module, own)
                adapter.hooks.append(FusingRefused(module))
        if fill is not None:
            fill(adapter)
    except BaseException:
        _take_off(adapter)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    adapter.sites = tuple(choice.site for choice in found)
    return adapter


def filling(tensors: Mapping[str, Tensor], path: object) -> Callable[[Adapter], None]:
    """A ``fill`` that gives PEFT's tensors the values of a file, all of them and no others."""

    def fill(adapter: Adapter) -> None:
        own = {key: tensor for part in adapter.parts for key, tensor in part.named_tensors().items()}
        for key, tensor in own.items():
            if key not in tensors or tensors[key].shape != tensor.shape:
                raise ValueError(f"{path} lacks the tensor {key!r} of shape {tuple(tensor.shape)}")
            tensor.data.copy_(tensors[key])
        if left := [key for key in tensors if key not in own]:
            raise ValueError(f"{path} holds a tensor {left[0]!r} that its method does not have")

    return fill


def _wrap(
    adapter: Adapter, method: PeftMethod, root: str, module: nn.Module, found: Sequence[TargetSite]
) -> None:
    """Let PEFT wrap the layers of one model, and put its wrappers under our states of layers."""
    from peft import get_peft_model

    if hasattr(module, "peft_config"):
        raise ValueError("the model already has an adapter of PEFT; detach it first")
    paths = [choice.site.name[len(root) + 1 :] if root else choice.site.name for choice in found]
    originals = [choice.layers[0].weight.detach().clone() for choice in found]
    config = method.configuration(f"(?:{'|'.join(map(re.escape, paths))})")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(adapter.seed)
        try:
            wrapped = get_peft_model(module, config, adapter_name=adapter.name)
        except (AssertionError, AttributeError, ArithmeticError, LookupError, RuntimeError) as error:
            raise ValueError(f"{method}: PEFT cannot do this here: {error!r}") from error
    label = f"{method.name}/{root}" if root else method.name
    part = PeftPart(label, wrapped, adapter.name, [choice.site for choice in found])
    wrappers = [module.get_submodule(path) for path in paths]
    layer_states = [PeftLayerState(list(choice.layers)) for choice in found]
    for index, (choice, wrapper, original) in enumerate(zip(found, wrappers, originals, strict=True)):
        layer = choice.layers[0]
        if not _is_wrapper(wrapper) or wrapper.get_base_layer() is not layer:
            raise ValueError(f"{method.name} cannot change {choice.site.name}; exclude it")
        if not torch.equal(layer.weight, original):
            layer.weight.data.copy_(original)
            raise ValueError(f"{method} changes the base weights at its start, which an adapter must not")
        layer_states[index].entries.append(Entry(part, index))
        adapter.layer_states[choice.site.name] = layer_states[index]
        adapter.hooks.append(wrapper.register_forward_hook(part.at_strength, with_kwargs=True))
        layer.__class__, layer._diffadapt = ADAPTED[type(layer)], layer_states[index]
    part.own(wrappers, layer_states)
    check_storable(method, part.named_tensors())
    for index in smallest_of_each_kind([choice.layers[0] for choice in found]):
        wrapper = part.copy_of(index, layer_states[index].base())
        check_merge(method, found[index].site.name, wrapper, adapter.name)
    adapter.add_method_state(part)


def _take_off(adapter: Adapter) -> None:
    for layer_state in adapter.layer_states.values():
        for layer in layer_state.layers:
            if "_diffadapt" in layer.__dict__:
                layer.__class__ = ORIGINAL[type(layer)]
                del layer._diffadapt
    for hook in adapter.hooks:
        hook.remove()


def _is_wrapper(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)
