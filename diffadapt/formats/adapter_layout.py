"""The layers and tensors that an adapter file names, checked against a model and against its method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from diffadapt.adapters.method_state import MethodPlan, plan_methods
from diffadapt.adapters.targets import TargetSite, sites_by_name
from diffadapt.common.messages import did_you_mean
from diffadapt.common.pipeline_components import is_text_encoder
from diffadapt.common.safetensors_file import check_finite
from diffadapt.formats.adapter_header import StoredSite
from diffadapt.methods import Method


def match_sites(
    roots: Mapping[str, nn.Module], stored_sites: Sequence[StoredSite], path: str | Path
) -> list[TargetSite]:
    """The layers of a model that the sites of a file name, in the file's order.

    Args:
        roots: the models by component name.
        path: of the file, for messages.

    Raises:
        ValueError: the model lacks a site, or has it with another shape; the message names the first.
    """
    check_listed_once(stored_sites, path)
    paths_by_component: dict[str, dict[str, bool]] = {}
    for site in stored_sites:
        paths_by_component.setdefault(site.component, {})[site.path] = True
    targets: dict[tuple[str, str], TargetSite] = {}  # by component and path in the file
    for component, paths in paths_by_component.items():
        root = _root_for(component, roots, path)
        prefix = f"{root}." if root else ""
        try:
            matched = sites_by_name(roots[root], paths, prefix)
        except ValueError as error:
            raise ValueError(f"{path} is of another architecture: {error}") from error
        for target in matched:
            targets[component, target.site.name.removeprefix(prefix)] = target
    in_order = []  # the tensors of the file are in the order of its sites
    for site in stored_sites:
        target = targets.get((site.component, site.path))
        if target is None or target.site.shape != site.shape:
            here = "another place for this weight" if target is None else f"shape {target.site.shape}"
            raise ValueError(
                f"{path} is of another architecture: {site.path} has shape {site.shape} there, {here} here"
            )
        in_order.append(target)
    return in_order


def check_listed_once(stored_sites: Sequence[StoredSite], path: str | Path) -> None:
    """Raises ValueError where a file lists a layer several times."""
    for name, count in Counter(site.name for site in stored_sites).most_common(1):
        if count > 1:
            raise ValueError(f"{path} lists the layer {name!r} {count} times")


def stored_ranks(stored_sites: Sequence[StoredSite]) -> dict[str, int]:
    """The ranks of sites that have another one than the method, by their names in the file."""
    return {site.name: site.rank for site in stored_sites if site.rank is not None}


def expected_tensors(
    method: Method, targets: Sequence[TargetSite], stored_sites: Sequence[StoredSite]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a file should hold, by their names in it."""
    sites = []
    for target, stored in zip(targets, stored_sites, strict=True):
        sites.append(replace(target.site, name=stored.name))
    return tensor_shapes(plan_methods(method, sites, stored_ranks(stored_sites)))


def tensor_shapes(plans: Sequence[MethodPlan]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in the file of an adapter of these methods."""
    shapes: dict[str, tuple[int, ...]] = {}
    for plan in plans:
        shapes |= plan.stored_shapes()
    return shapes


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], path: str | Path
) -> None:
    """Raises ValueError naming the first tensor that is missing, of another shape, too many or not finite."""
    # shapes before values: what does not fit is named, whatever it holds
    for key, shape in expected.items():
        if key not in tensors:
            raise ValueError(f"{path} lacks the tensor {key!r}{did_you_mean(key, tensors)}")
        if tuple(tensors[key].shape) != shape:
            raise ValueError(f"{path}: {key} has shape {tuple(tensors[key].shape)}, expected {shape}")
    for key in tensors:
        if key not in expected:
            raise ValueError(f"{path} holds a tensor {key!r} that its method does not have")
    check_finite(tensors, path)


def _root_for(component: str, roots: Mapping[str, nn.Module], path: str | Path) -> str:
    if component in roots:
        return component
    # a pipeline may call its denoiser unet or transformer, a bare model has no name
    denoiser = next((root for root in roots if not is_text_encoder(root)), None)
    if denoiser is not None and not is_text_encoder(component):
        return denoiser  # saved from a bare model and loaded into a pipeline, or the other way
    raise ValueError(f"{path} changes the {component!r} of a pipeline; load it into one that has it")
