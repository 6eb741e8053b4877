"""The layers and tensors that an adapter file names, found in a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from diffadapt.adapters.method_state import plan_methods
from diffadapt.adapters.targets import TargetSite, sites_by_name
from diffadapt.common.messages import did_you_mean
from diffadapt.common.pipeline_components import is_text_encoder
from diffadapt.common.safetensors_file import check_finite
from diffadapt.formats.adapter_header import StoredSite
from diffadapt.methods import Method


def match_sites(
    roots: Mapping[str, nn.Module], stored: Sequence[StoredSite], path: str | Path
) -> tuple[list[TargetSite], dict[str, int], list[str]]:
    """The model's layers for the stored sites in order, the ranks by new name, and the stored names.

    Raises: ValueError naming the first site that the model does not have, or has with another shape.
    """
    places = Counter((component, name) for component, name, *_ in stored)
    (component, name), count = places.most_common(1)[0] if places else (("", ""), 0)
    if count > 1:
        raise ValueError(f"{path} lists the layer {name!r} {count} times")
    found: dict[tuple[str, str], TargetSite] = {}
    for component in dict.fromkeys(component for component, *_ in stored):
        root = _root_for(component, roots, path)
        wanted = {name: True for own, name, *_ in stored if own == component}
        try:
            chosen = sites_by_name(roots[root], wanted, f"{root}." if root else "")
        except ValueError as error:
            raise ValueError(f"{path} is of another architecture: {error}") from error
        prefix = len(root) + 1 if root else 0
        found.update({(component, choice.site.name[prefix:]): choice for choice in chosen})
    ranks: dict[str, int] = {}
    for component, name, shape, rank in stored:
        choice = found.get((component, name))
        if choice is None or choice.site.shape != shape:
            has = "another place for this weight" if choice is None else f"shape {choice.site.shape}"
            raise ValueError(f"{path} is of another architecture: {name} has shape {shape} there, {has} here")
        if rank is not None:
            ranks[choice.site.name] = rank
    names = [f"{component}.{name}" if component else name for component, name, *_ in stored]
    return [found[component, name] for component, name, *_ in stored], ranks, names


def _root_for(component: str, roots: Mapping[str, nn.Module], path: str | Path) -> str:
    if component in roots:
        return component
    denoiser = next((root for root in roots if not is_text_encoder(root)), None)
    if denoiser is not None and not is_text_encoder(component):
        return denoiser  # saved from a bare model and loaded into a pipeline, or the other way
    raise ValueError(f"{path} changes the {component!r} of a pipeline; load it into one that has it")


def expected_tensors(
    method: Method, found: Sequence[TargetSite], ranks: Mapping[str, int], names: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors the file should hold, by their names in it."""
    sites = [replace(choice.site, name=name) for choice, name in zip(found, names, strict=True)]
    renamed = {
        new: ranks[choice.site.name]
        for choice, new in zip(found, names, strict=True)
        if choice.site.name in ranks
    }
    shapes = {}
    for plan in plan_methods(method, sites, renamed):
        shapes |= plan.stored()
    return shapes


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], path: str | Path
) -> None:
    """Raises ValueError naming the first tensor that is missing, of another shape, too many or not finite."""
    for key, shape in expected.items():
        if key not in tensors:
            raise ValueError(f"{path} lacks the tensor {key!r}{did_you_mean(key, tensors)}")
        if tuple(tensors[key].shape) != shape:
            raise ValueError(f"{path}: {key} has shape {tuple(tensors[key].shape)}, expected {shape}")
    for key in tensors:
        if key not in expected:
            raise ValueError(f"{path} holds a tensor {key!r} that its method does not have")
    check_finite(tensors, path)
