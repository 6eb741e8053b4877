"""Attaching the adapter of another tool to a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.attach import attach_sites, components
from diffadapt.adapters.layers import layer_state_of
from diffadapt.adapters.targets import TargetSite, sites_by_name
from diffadapt.common.messages import shorten_list
from diffadapt.common.pipeline_components import without_denoiser
from diffadapt.formats.foreign.fused_layers import LayerPath, split_change
from diffadapt.formats.foreign.layer_names import LayerNames, missing_layers_hint
from diffadapt.formats.foreign.open import ForeignAdapter
from diffadapt.formats.foreign.stored_change import StoredChange, fit_to_layer
from diffadapt.methods.imported import Imported


def attach_foreign(model: object, foreign: ForeignAdapter, *, name: str, strength: float) -> Adapter:
    """Attaches it to a model or pipeline, as method `imported`.

    Raises:
        ValueError: the model lacks layers of the file, or has one with another shape; the message names them.
            The model is then as before.
    """
    roots = components(model, True)
    try:
        by_path = locate(foreign, roots)
    except ValueError as error:
        raise ValueError(f"{foreign.path}: {error}") from error
    targets: list[TargetSite] = []
    for root, module in roots.items():
        paths = {path: True for component, path in by_path if component == root}
        if paths:
            targets += sites_by_name(module, paths, f"{root}." if root else "")
    try:
        changes = _fit_to_layers(by_path, targets)
        adapter = attach_changes(roots, changes, targets, name=name)
    except ValueError as error:
        raise ValueError(f"{foreign.path}: {error}") from error
    adapter.strength = strength
    return adapter


def attach_changes(
    roots: Mapping[str, nn.Module],
    changes: Mapping[str, StoredChange],
    targets: Sequence[TargetSite],
    *,
    name: str,
) -> Adapter:
    """Attaches changes of layers, by site name, as method `imported`.

    Args:
        roots: the models by component name.
        targets: the layers of the changes.
        name: of the adapter.
    """
    changed_components = {site.partition(".")[0] for site in changes}
    changed_roots = {}
    for component, module in roots.items():
        if component == "" or component in changed_components:  # "" is a bare model
            changed_roots[component] = module
    method = imported_method(changes)
    fill = _filling(changes)
    return attach_sites(changed_roots, method, targets, name=name, seed=0, ranks={}, fill=fill)


def imported_method(changes: Mapping[str, StoredChange]) -> Imported:
    """The method whose tensors are those of changes by site name.

    Raises:
        ValueError: a multiplier does not fit into float32.
    """
    forms = {}
    for site, change in changes.items():
        # "unet." is left out, so that the method fits the bare model as well as its pipeline
        forms[without_denoiser(site)] = {
            "form": change.form,
            "multiplier": change.multiplier,
            "shapes": {key: list(tensor.shape) for key, tensor in change.tensors.items()},
        }
    return Imported(forms)


def locate(foreign: ForeignAdapter, roots: Mapping[str, nn.Module]) -> dict[LayerPath, StoredChange]:
    """The changes by the layers of the model that they belong to."""
    names = LayerNames(roots)
    by_path: dict[LayerPath, StoredChange] = {}
    missing: list[str] = []
    for layer, change in foreign.changes.items():
        layer_path = names.find(layer)
        by_layer = {}
        if layer_path is not None:
            by_layer = {layer_path: change}
        elif parts := names.find_original(layer):
            by_layer = split_change(layer, change, parts)
        # a second name for one layer counts as missing: its change would have no place
        if not by_layer or by_layer.keys() & by_path.keys():
            missing.append(layer)
        else:
            by_path |= by_layer
    if missing:
        raise ValueError(
            f"it changes layers that this model does not have: {shorten_list(sorted(missing))}"
            f"{missing_layers_hint(missing)}"
        )
    return by_path


def _fit_to_layers(
    by_path: Mapping[LayerPath, StoredChange], targets: Sequence[TargetSite]
) -> dict[str, StoredChange]:
    """The changes by the names of sites, in the shapes of their layers."""
    by_name = {}
    for (component, path), change in by_path.items():
        by_name[f"{component}.{path}" if component else path] = change
    changes: dict[str, StoredChange] = {}
    for target in targets:
        site = target.site
        if site.name not in by_name:  # layers with one weight are one site, under the first one's name
            raise ValueError(f"{site.name} shares its weight with another layer the file changes")
        state = layer_state_of(target.layers)
        changes[site.name] = fit_to_layer(by_name[site.name], site, state.base(), state.base_bias())
    return changes


def _filling(changes: Mapping[str, StoredChange]) -> Callable[[Adapter], None]:
    """A function that copies the tensors of changes into those of an adapter."""

    def fill(adapter: Adapter) -> None:
        part = adapter.parts[0]  # of `imported`, the adapter's only method
        for site, parameters in zip(part.sites, part.tensors, strict=True):
            for key, parameter in parameters.items():
                parameter.data.copy_(changes[site.name].tensors[key])

    return fill
