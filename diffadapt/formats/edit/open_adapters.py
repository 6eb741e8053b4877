"""Adapter files opened to be resized or combined: on their base, or without it.

Without a base, the changes are computed from the tensors of the files alone. That is possible where no change
depends on the weights of the base, and where the file tells the shapes of its layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.attach import detach
from diffadapt.adapters.method_state import MethodState, plan_methods
from diffadapt.adapters.targets import TargetSite
from diffadapt.algebra.expression import Update
from diffadapt.formats.adapter_file import is_own, load, read_adapter_file, save, write_adapter_file
from diffadapt.formats.adapter_header import Configuration
from diffadapt.formats.adapter_layout import check_listed_once, check_tensors, stored_ranks, tensor_shapes
from diffadapt.formats.edit.write_foreign import OutputLayer, write_changes
from diffadapt.formats.foreign.attach import attach_changes, imported_method
from diffadapt.formats.foreign.open import ForeignAdapter, open_foreign
from diffadapt.formats.foreign.stored_change import StoredChange
from diffadapt.formats.layer_change import LayerChange, layer_changes
from diffadapt.methods.imported import MAGNITUDES
from diffadapt.methods.parse_method import read_method
from diffadapt.methods.site import LayerKind, Site

Changes = Mapping[str, StoredChange]  # by site name

# by the number of dimensions of the weight; a table of embeddings looks like a linear layer
_KINDS: dict[int, LayerKind] = {1: "norm", 2: "linear", 3: "conv", 4: "conv", 5: "conv"}
_LARGEST = 2**28  # values of a layer's weight: a small file can name any shape


class BaseNeeded(ValueError):
    """The changes in a file depend on the weights of the base, or only the base tells its layers."""


class OpenedAdapters(Protocol):
    """Adapter files whose changes can be read, and written back in one format."""

    @property
    def num_parameters(self) -> int:
        """Number of trained values of all files."""

    def layers(self) -> Iterator[LayerChange]:
        """The sum of what the files change in each layer, every file at its strength."""

    def write(
        self, changes: Mapping[str, StoredChange], path: str | Path, metadata: Mapping[str, str]
    ) -> Path:
        """Writes other changes of these layers, by site name. Returns the file written."""


@dataclass(frozen=True)
class AttachedAdapters:
    """Adapters attached to their base; `write` takes them off.

    Attributes:
        adapters: one for each file.
        base: name or path of the base.
    """

    adapters: list[Adapter]
    base: str

    @property
    def num_parameters(self) -> int:
        return sum(adapter.num_parameters for adapter in self.adapters)

    def layers(self) -> Iterator[LayerChange]:
        return layer_changes(self.adapters)

    def write(
        self, changes: Mapping[str, StoredChange], path: str | Path, metadata: Mapping[str, str]
    ) -> Path:
        save(replaced(self.adapters, changes), path, base=self.base, metadata=metadata)
        return Path(path)


@dataclass(frozen=True)
class NativeFiles:
    """Files in our own format, all of the same layers.

    Attributes:
        configuration: of the first file.
        changes: by site name.
        num_parameters: number of trained values of all files.
    """

    configuration: Configuration
    changes: dict[str, LayerChange]
    num_parameters: int

    def layers(self) -> Iterator[LayerChange]:
        return iter(self.changes.values())

    def write(
        self, changes: Mapping[str, StoredChange], path: str | Path, metadata: Mapping[str, str]
    ) -> Path:
        method = imported_method(changes)
        stored_sites = {site.name: site._replace(rank=None) for site in self.configuration.sites}
        sites = []
        changed_sites = []
        for name in changes:
            sites.append(self.changes[name].site)
            changed_sites.append(stored_sites[name])
        tensors = {}
        for plan in plan_methods(method, sites):
            for site in plan.sites:
                for key, tensor in changes[site.name].tensors.items():
                    tensors[f"{plan.label}/{site.name}/{key}"] = tensor.float().contiguous()
        write_adapter_file(
            path,
            tensors,
            name="default",
            seed=0,
            method=method,
            sites=changed_sites,
            base=self.configuration.json["base"],
            metadata=metadata,
        )
        return Path(path)


@dataclass(frozen=True)
class ForeignFiles:
    """Files of other tools, all in one format, which `write` keeps.

    Attributes:
        files: as read.
        changes: by the name of the layer in the files.
    """

    files: list[ForeignAdapter]
    changes: dict[str, LayerChange]

    @property
    def num_parameters(self) -> int:
        count = 0
        for file in self.files:
            for change in file.changes.values():
                for tensor in change.tensors.values():
                    count += tensor.numel()
        return count

    def layers(self) -> Iterator[LayerChange]:
        return iter(self.changes.values())

    def write(
        self, changes: Mapping[str, StoredChange], path: str | Path, metadata: Mapping[str, str]
    ) -> Path:
        layers = []
        for name, change in changes.items():
            layers.append(OutputLayer(name, self.changes[name].site.shape, change))
        return write_changes(layers, path, self.files, metadata)


def open_on_base(files: Sequence[tuple[str, float]], pipeline: object, base: str) -> AttachedAdapters:
    """Attaches adapter files (path, strength) to a pipeline, whose name or path is `base`."""
    adapters = []
    for number, (path, strength) in enumerate(files):
        adapters.append(load(pipeline, path, strength=strength, name=f"adapter-{number}"))
    return AttachedAdapters(adapters, base)


def open_without_base(files: Sequence[tuple[str, float]]) -> NativeFiles | ForeignFiles:
    """Reads adapter files (path, strength) that are all our own, or all of one other format.

    Raises:
        BaseNeeded: a change depends on the base; the message names the file, the layer and the kind.
        FileNotFoundError, ValueError: as `load` does.
    """
    # the strength goes into the tensors of the result
    for _, strength in files:
        if not math.isfinite(strength):
            raise ValueError(f"strength must be a finite number, got {strength!r}")
    foreign = []
    formats: dict[str, str] = {}
    for path, _ in files:
        if is_own(path):
            formats[path] = "diffadapt"
        else:
            adapter = open_foreign(path)
            foreign.append(adapter)
            formats[str(adapter.path)] = adapter.format
    if not foreign:
        return _open_native(files)
    if len(set(formats.values())) > 1:
        listed = ", ".join(f"{path}: {name}" for path, name in formats.items())
        raise BaseNeeded(f"files of several formats ({listed}) name the same layers differently")
    return _open_foreign(foreign, [strength for _, strength in files])


def replaced(adapters: Sequence[Adapter], changes: Changes, *, name: str = "default") -> Adapter:
    """A new adapter with these changes, by site name, on the layers of adapters that are taken off."""
    roots = {}
    target_by_name = {}
    for adapter in adapters:
        roots |= adapter.roots
        for site in adapter.sites:
            layers = tuple(adapter.layer_states[site.name].layers)
            target_by_name[site.name] = TargetSite(site, layers, True)
    # last, since a detached adapter no longer knows its layers
    for adapter in adapters:
        detach(adapter)
    targets = [target_by_name[site] for site in changes]
    return attach_changes(roots, changes, targets, name=name)


@torch.no_grad()
def _open_native(files: Sequence[tuple[str, float]]) -> NativeFiles:
    updates: dict[str, list[tuple[float, Update]]] = {}
    num_parameters = 0
    first: Configuration | None = None
    sites: list[Site] = []
    for path, strength in files:
        configuration, tensors = read_adapter_file(path)
        method = read_method(configuration.method)
        if method.library == "peft":
            raise BaseNeeded(f"{path} holds a method of PEFT's library, which needs its model")
        if first is None:
            first = configuration
            sites = [_site(site.name, site.shape) for site in configuration.sites]
        elif not _same_layers(configuration, first):
            raise BaseNeeded(f"{path} changes other layers, or another base, than {files[0][0]}")
        ranks = stored_ranks(configuration.sites)
        try:
            check_listed_once(configuration.sites, path)
            plans = plan_methods(method, sites, ranks)
            check_tensors(tensor_shapes(plans), tensors, path)
        except ValueError as error:  # e.g. a table of embeddings, which its shape does not tell from a matrix
            message = str(error)
            raise BaseNeeded(message if str(path) in message else f"{path}: {message}") from error
        for plan in plans:
            num_parameters += plan.num_parameters
            # one zero, seen in the shape of each weight: a base takes no memory
            zero_weights = [torch.zeros(()).expand(site.shape) for site in plan.sites]
            state = MethodState(plan, zero_weights, configuration.seed)
            for key, tensor in state.named_tensors().items():
                tensor.data.copy_(tensors[key])
            for index, site in enumerate(plan.sites):
                update = state.update(index, zero_weights[index])
                _check_independent(update, site, method, path)
                updates.setdefault(site.name, []).append((strength, update))
    changes = {}
    for site in sites:
        if site.name in updates:
            changes[site.name] = _without_base(site, updates[site.name])
    return NativeFiles(first, changes, num_parameters)


def _open_foreign(files: Sequence[ForeignAdapter], strengths: Sequence[float]) -> ForeignFiles:
    sites: dict[str, Site] = {}
    for file in files:
        for name, change in file.changes.items():
            site = _site(name, _weight_shape(name, change, file))
            other = sites.setdefault(name, site)
            if other.shape != site.shape:
                raise BaseNeeded(
                    f"{name} has shape {other.shape} in one file and {site.shape} in {file.path}"
                )
    updates: dict[str, list[tuple[float, Update]]] = {}
    for file, strength in zip(files, strengths, strict=True):
        for name, change in file.changes.items():
            update = _imported_update(sites[name], change, file.path)
            updates.setdefault(name, []).append((strength, update))
    changes = {}
    for name, site in sites.items():
        changes[name] = _without_base(site, updates[name])
    return ForeignFiles(list(files), changes)


def _imported_update(site: Site, change: StoredChange, path: Path) -> Update:
    """Raises ValueError naming the file where the tensors do not fit together."""
    try:
        method = imported_method({site.name: change})
        method.trained_tensors(site)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    tensors = {key: tensor.float() for key, tensor in change.tensors.items()}  # as adapters hold them
    zero_weight = torch.zeros(()).expand(site.shape)
    return method.update(site, tensors, zero_weight)


def _weight_shape(name: str, change: StoredChange, file: ForeignAdapter) -> tuple[int, ...]:
    """The shape of the layer's weight, where the factors tell it.

    Raises:
        BaseNeeded: they do not, or the change depends on the base.
    """
    tensors = change.tensors
    has_magnitudes = not tensors.keys().isdisjoint(MAGNITUDES)
    # a magnitude divides by the norm of the base, a replacement subtracts it, VeRA's `down` is cut to it
    if not (has_magnitudes or change.replacements or change.down_is_shared):
        if change.form == "lora":
            # down (r, in / groups * kernel)
            channels, remainder = divmod(tensors["down"].shape[1], math.prod(change.kernel))
            if remainder == 0:
                return len(tensors["up"]), channels, *change.kernel
        if change.form == "tucker":  # core (r, r, *kernel)
            return len(tensors["up"]), tensors["down"].shape[1], *change.kernel
        # of more dimensions it may be a table of embeddings
        if change.form == "dense" and tensors["weight"].dim() == 1:
            return tuple(tensors["weight"].shape)
    kind = ""
    if has_magnitudes:
        kind = " with magnitudes"
    elif change.replacements:
        kind = " that replaces weights"
    raise BaseNeeded(f"{file.path}: {name} has the form {change.form}{kind}, which needs the base")


def _site(name: str, shape: tuple[int, ...]) -> Site:
    """A layer of which only the shape of the weight is known."""
    # `type` and not `isinstance`: JSON's true is an int to the latter
    are_sizes = all(type(size) is int and size > 0 for size in shape)
    if not are_sizes or math.prod(shape) > _LARGEST or len(shape) not in _KINDS:
        raise BaseNeeded(
            f"{name!r} has shape {shape}, not sizes of 1 to {_LARGEST} values in all, in 1 to 5 dimensions"
        )
    return Site(name, _KINDS[len(shape)], shape, has_bias=True)


def _without_base(site: Site, updates: Sequence[tuple[float, Update]]) -> LayerChange:
    zero = torch.zeros(())
    return LayerChange(site, zero.expand(site.shape), zero.expand(site.bias_shape), updates)


def _check_independent(update: Update, site: Site, method: object, path: str) -> None:
    """Raises BaseNeeded where the change would be another one on another base."""
    scales = update.scale is not None or update.bias_scale is not None
    if scales or (update.delta is not None and update.delta.depends_on_base):
        raise BaseNeeded(f"{path}: the change of {site.name} depends on the base: {method}")
    if update.delta is not None and update.delta.is_dense and site.kind != "norm":
        raise BaseNeeded(
            f"{path}: only the base tells whether {site.name}, a whole difference, is a table of embeddings: "
            f"{method}"
        )


def _same_layers(first: Configuration, second: Configuration) -> bool:
    """Whether two files change layers of the same names and shapes, on the same base."""
    if first.base_values != second.base_values or len(first.sites) != len(second.sites):
        return False
    for site, other in zip(first.sites, second.sites, strict=True):
        if (site.component, site.path, site.shape) != (other.component, other.path, other.shape):
            return False
    return True
