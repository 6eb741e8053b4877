"""Adapter files opened without their base, where what they change does not depend on its weights.

A model of zeros that takes no memory stands in for the base: layers of the right names and shapes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.targets import sites_by_name
from diffadapt.algebra.full_rank import Dense, EntrywiseProduct, Kron, LowRankHadamard
from diffadapt.algebra.low_rank import FeatureSum, LowRank, Reparametrized, Tucker
from diffadapt.common.safetensors_file import read_header
from diffadapt.formats.adapter_file import is_own, load, read_metadata, save
from diffadapt.formats.adapter_header import read_configuration
from diffadapt.formats.edit.resize_combine import replaced
from diffadapt.formats.edit.write_foreign import Layer, write_forms
from diffadapt.formats.foreign.attach import attach_forms, fitted
from diffadapt.formats.foreign.open import Foreign, open_foreign
from diffadapt.formats.foreign.stored_change import Form
from diffadapt.methods.imported import MAGNITUDES
from diffadapt.methods.parse_method import read_method
from diffadapt.methods.peft_config import PeftMethod

_INDEPENDENT = (LowRank, Tucker, LowRankHadamard, EntrywiseProduct, Kron, FeatureSum, Reparametrized)
_LARGEST = 2**28  # values of a layer's weight: a small file can name any shape
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class BaseNeeded(ValueError):
    """What files hold depends on the base's weights, or has names that only the base can match."""


@dataclass(frozen=True)
class Opened:
    """Adapters on their base or on a stand-in for it.

    Attributes:
        adapters: one for each file, at its strength.
        base: its name, recorded in a file of our own.
        base_values: its fingerprints, where a stand-in has none of its own.
        foreign: the files as read, where another tool wrote them and their format is to be kept.
    """

    adapters: list[Adapter]
    base: str | None = None
    base_values: dict[str, str] | None = None
    foreign: tuple[Foreign, ...] = ()

    def write(self, forms: Mapping[str, Form], path: str | Path, metadata: Mapping[str, str]) -> Path:
        """Write changes of the adapters' sites, which come off their model. Returns the file written."""
        if self.foreign:
            shapes = {site.name: site.shape for adapter in self.adapters for site in adapter.sites}
            layers = [Layer(site.replace("/", "."), shapes[site], form) for site, form in forms.items()]
            return write_forms(layers, path, self.foreign, metadata)
        adapter = replaced(self.adapters, forms)
        adapter.base_values = self.base_values
        save(adapter, path, base=self.base, metadata=metadata)
        return Path(path)


def open_without_base(files: Sequence[tuple[str, float]]) -> Opened:
    """Open adapter files (path, strength) that are all our own, or all of one other format.

    Raises: BaseNeeded naming the file, the layer and its kind of change; FileNotFoundError and ValueError as
        ``load`` does.
    """
    own = {path: is_own(path) for path, _ in files}
    if all(own.values()):
        return _open_own(files)
    foreign = [open_foreign(path) for path, _ in files if not own[path]]
    formats = {path: "diffadapt" for path, ours in own.items() if ours}
    formats |= {str(one.path): one.family for one in foreign}
    if len(set(formats.values())) > 1:
        listed = ", ".join(f"{path}: {family}" for path, family in formats.items())
        raise BaseNeeded(f"files of several formats ({listed}) name the same layers differently")
    return _open_foreign(foreign, [strength for _, strength in files])


def _open_own(files: Sequence[tuple[str, float]]) -> Opened:
    configurations = {}
    for path, _ in files:
        read_metadata(path)  # raises for a damaged file
        configurations[path] = read_configuration(read_header(Path(path)).get("adapter"), path)
        if isinstance(read_method(configurations[path].method), PeftMethod):
            raise BaseNeeded(f"{path} holds a method of PEFT's library, which needs its model")
    first = next(iter(configurations.values()))
    layers = [(site.component, site.path, site.shape) for site in first.sites]
    for path, other in configurations.items():
        others = [(site.component, site.path, site.shape) for site in other.sites]
        if (others, other.base_values) != (layers, first.base_values):
            raise BaseNeeded(f"{path} changes other layers, or another base, than {files[0][0]}")
    parts = {component for component, *_ in layers}
    modules = {part: _stand_in((path, shape) for own, path, shape in layers if own == part) for part in parts}
    model = modules[""] if "" in modules else SimpleNamespace(**modules)
    adapters = []
    for number, (path, strength) in enumerate(files):
        adapters.append(_load(model, path, strength, f"adapter-{number}"))
        _check_independent(adapters[-1], path)
    values = {key: value for key, value in first.whole["base"].items() if key != "name"}
    return Opened(adapters, first.base_name, values)


def _load(model: object, path: str, strength: float, name: str) -> Adapter:
    try:
        with warnings.catch_warnings():  # the stand-in's values are not those it was trained on
            warnings.filterwarnings("ignore", message=".*was trained on other weights")
            return load(model, path, strength=strength, name=name)
    except ValueError as error:  # e.g. a table of embeddings, which its shape does not tell from a matrix
        raise BaseNeeded(f"{path}: {error}") from error


def _check_independent(adapter: Adapter, path: str) -> None:
    """Raises BaseNeeded for the first layer whose change would be another one on another base."""
    for site in adapter.sites:
        for entry in adapter.entries(adapter.layer_states[site.name]):
            update = entry.owner.update(entry.index, adapter.layer_states[site.name].base())
            known = (*_INDEPENDENT, Dense) if site.kind == "norm" else _INDEPENDENT
            added = update.delta is None or isinstance(update.delta, known)
            if not added or update.scale is not None or update.bias_scale is not None:
                raise BaseNeeded(f"{path}: the change of {site.name} depends on the base: {adapter.method}")


def _open_foreign(files: Sequence[Foreign], strengths: Sequence[float]) -> Opened:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        for layer, form in file.forms.items():
            shape = _shape(layer, form, file)
            known = shapes.setdefault(layer, shape)
            if known != shape:
                raise BaseNeeded(f"{layer} has shape {known} in one file and {shape} in {file.path}")
    # names with "/" for "." stay what they are in the file, whatever a model makes of them
    model = _stand_in((layer.replace(".", "/"), shape) for layer, shape in shapes.items())
    adapters = []
    for number, (file, strength) in enumerate(zip(files, strengths, strict=True)):
        placed = {("", layer.replace(".", "/")): form for layer, form in file.forms.items()}
        found = sites_by_name(model, {path: True for _, path in placed})
        forms = fitted(placed, found)
        adapters.append(attach_forms({"": model}, forms, found, name=f"adapter-{number}"))
        adapters[-1].strength = strength
    return Opened(adapters, foreign=tuple(files))


def _shape(layer: str, form: Form, file: Foreign) -> tuple[int, ...]:
    """The shape of the layer's weight, as far as the factors tell it. Raises BaseNeeded where they do not."""
    tensors = form.tensors
    decomposed = [key for key in MAGNITUDES if key in tensors]
    plain = not decomposed and not form.replaces and not form.cut
    if plain and form.form == "lora":
        channels, rest = divmod(tensors["down"].shape[1], math.prod(form.kernel))
        if rest == 0:
            return (len(tensors["up"]), channels, *form.kernel)
    if plain and form.form == "tucker":
        return (len(tensors["up"]), tensors["down"].shape[1], *form.kernel)
    if plain and form.form == "dense" and tensors["weight"].dim() == 1:
        return tuple(tensors["weight"].shape)
    kind = " with magnitudes" if decomposed else " that replaces weights" if form.replaces else ""
    raise BaseNeeded(f"{file.path}: {layer} has the form {form.form}{kind}, which needs the base")


def _stand_in(layers: Iterable[tuple[str, tuple[int, ...]]]) -> nn.Module:
    """A model with layers of these paths and weight shapes, all zero and without memory of their own."""
    root = nn.Module()
    for path, shape in layers:
        *parents, last = path.split(".")
        module = root
        try:
            if not all(type(size) is int and size > 0 for size in shape) or math.prod(shape) > _LARGEST:
                raise ValueError(f"not sizes of 1 to {_LARGEST} values in all")
            for parent in parents:
                if parent not in module._modules:
                    module.add_module(parent, nn.Module())
                module = module._modules[parent]
            module.add_module(last, _layer(shape))
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise BaseNeeded(f"a layer {path!r} of shape {shape} cannot be stood in for ({error})") from error
    return root


def _layer(shape: tuple[int, ...]) -> nn.Module:
    if len(shape) == 1:
        layer = nn.LayerNorm(shape[0], device="meta")
    elif len(shape) == 2:
        layer = nn.Linear(shape[1], shape[0], device="meta")
    else:
        convolution = _CONVOLUTIONS[len(shape) - 2]
        layer = convolution(shape[1], shape[0], shape[2:], device="meta")
    for name, parameter in dict(layer.named_parameters()).items():
        setattr(layer, name, nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
    return layer
