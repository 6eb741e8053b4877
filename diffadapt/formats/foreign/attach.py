"""Attach what another tool trained to a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.attach import attach_sites, components
from diffadapt.adapters.layers import layer_state_of
from diffadapt.adapters.targets import TargetSite, sites_by_name
from diffadapt.common.messages import shorten_list
from diffadapt.common.pipeline_components import without_denoiser
from diffadapt.formats.foreign.layer_names import Names, Place, remedy
from diffadapt.formats.foreign.open import Foreign
from diffadapt.formats.foreign.stored_change import Form, fit
from diffadapt.methods.imported import Imported


def attach_foreign(model: object, foreign: Foreign, *, name: str, strength: float) -> Adapter:
    """Attach to a model or pipeline, as method ``imported``.

    Raises: ValueError naming the layers the model does not have, or the first whose shape does not fit; the
        model is then as before.
    """
    roots = components(model, True)
    placed = _place(foreign, roots)
    found = [
        choice
        for root, module in roots.items()
        if (wanted := {path: True for own, path in placed if own == root})
        for choice in sites_by_name(module, wanted, f"{root}." if root else "")
    ]
    try:
        forms = fitted(placed, found)
        adapter = attach_forms(roots, forms, found, name=name)
    except ValueError as error:
        raise ValueError(f"{foreign.path}: {error}") from error
    adapter.strength = strength
    return adapter


def attach_forms(
    roots: Mapping[str, nn.Module], forms: Mapping[str, Form], found: Sequence[TargetSite], *, name: str
) -> Adapter:
    """An ``imported`` adapter with these forms by site name."""
    layout = {
        without_denoiser(site): {
            "form": form.form,
            "multiplier": form.multiplier,
            "shapes": {key: list(tensor.shape) for key, tensor in form.tensors.items()},
        }
        for site, form in forms.items()
    }
    used = {site.partition(".")[0] for site in forms}
    chosen = {root: module for root, module in roots.items() if root in used or root == ""}
    fill = _filling(forms)
    return attach_sites(chosen, Imported(layout), found, name=name, seed=0, ranks={}, fill=fill)


def fitted(placed: Mapping[Place, Form], found: Sequence[TargetSite]) -> dict[str, Form]:
    """The forms by the names of sites, in the shapes of their layers."""
    by_name = {f"{root}.{path}" if root else path: form for (root, path), form in placed.items()}
    forms: dict[str, Form] = {}
    for choice in found:
        site = choice.site
        if site.name not in by_name:
            raise ValueError(f"{site.name} shares its weight with another layer the file changes")
        layer_state = layer_state_of(choice.layers)
        forms[site.name] = fit(by_name[site.name], site, layer_state.base(), layer_state.base_bias())
    return forms


def _place(foreign: Foreign, roots: Mapping[str, nn.Module]) -> dict[Place, Form]:
    names = Names(roots)
    placed: dict[Place, Form] = {}
    missing: list[str] = []
    for layer, form in foreign.forms.items():
        place = names.find(layer)
        if place is None or place in placed:
            missing.append(layer)
        else:
            placed[place] = form
    if missing:
        raise ValueError(
            f"{foreign.path} changes layers that this model does not have: {shorten_list(sorted(missing))}"
            f"{remedy(missing)}"
        )
    return placed


def _filling(forms: Mapping[str, Form]) -> Callable[[Adapter], None]:
    def fill(adapter: Adapter) -> None:
        part = adapter.parts[0]
        for site, tensors in zip(part.sites, part.tensors, strict=True):
            own: Mapping[str, Tensor] = forms[site.name].tensors
            for key, tensor in tensors.items():
                tensor.data.copy_(own[key])

    return fill
