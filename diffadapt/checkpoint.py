"""Adapter files: one safetensors file that is complete, checked when read, and never unpickled."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from diffadapt.adapter import Adapter
from diffadapt.attaching import attach_sites, components
from diffadapt.configuration import StoredSite, read_configuration
from diffadapt.files import write_atomically
from diffadapt.fingerprints import fingerprints
from diffadapt.imports import attach_foreign, open_foreign
from diffadapt.layers import Record
from diffadapt.method_names import read_method
from diffadapt.methods import Method
from diffadapt.methods.peft_limits import check_sizes
from diffadapt.methods.peft_method import PeftMethod
from diffadapt.nearest import near
from diffadapt.parts import plan_parts
from diffadapt.peft_bridge import filling
from diffadapt.site import Site
from diffadapt.targets import Found, choose
from diffadapt.tensor_file import check_numbers, checksums, read_header, read_tensors

FORMAT_VERSION = 1


def save(
    adapter: Adapter, path: str | Path, *, base: str | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Write an adapter with its configuration and the fingerprint of its base.

    Args:
        base: name or path of the base, recorded for whoever loads the file.
        metadata: further text to keep in the file's header, e.g. a training summary.
    """
    tensors = {
        key: tensor.detach().cpu().contiguous()
        for part in adapter.parts
        for key, tensor in part.named().items()
    }
    values = adapter.base_values or fingerprints(list(adapter.records.values()))
    config = {
        "name": adapter.name,
        "seed": adapter.seed,
        "method": [{"name": part.name, "options": part.settings} for part in adapter.method.parts],
        "sites": [_describe(site, adapter) for site in adapter.sites],
        "base": {"name": base, **values},
    }
    described = json.dumps(config)
    header = {
        **(metadata or {}),
        "format": "diffadapt",
        "format_version": str(FORMAT_VERSION),
        "adapter": described,
        **checksums(tensors, described),
    }
    write_atomically(path, lambda temporary: save_file(tensors, temporary, header))


def load(
    model: object,
    path: str | Path,
    *,
    strength: float = 1.0,
    name: str | None = None,
    strict_base: bool = False,
) -> Adapter:
    """Attach the adapter of a file to a model or pipeline: ours, or one of another tool (see ``imports``).

    Args:
        strength: t in ``W + t (W' - W)``.
        name: of the adapter; the file's own by default.
        strict_base: make a base with other values than it was trained on an error, not a warning.

    Raises: FileNotFoundError; ValueError for a file that is truncated, altered, of another version or of
        another architecture (naming the first name or shape that does not fit). The model is then as before.
    """
    if not is_own(path):
        foreign = open_foreign(path)
        return attach_foreign(model, foreign, name=name or "default", strength=strength)
    header, tensors = _read(Path(path))
    config = read_configuration(header.get("adapter"), path)
    method, stored = read_method(config.method), config.sites
    roots = components(model, any(site.component.startswith("text_encoder") for site in stored))
    found, ranks, names = _match(roots, stored, path)
    if isinstance(method, PeftMethod):
        widest = max(sum(choice.site.shape) for choice in found)
        stored_values = sum(tensor.numel() for tensor in tensors.values())
        check_sizes(method.name, method.options, widest, stored_values)
        check_numbers(tensors, path)
        fill = filling(tensors, path)
    else:
        expected = _expected(method, found, ranks, names)
        _check_tensors(expected, tensors, path)
        fill = _filling(expected, tensors)
    records = [getattr(f.layers[0], "_diffadapt", None) or Record(list(f.layers)) for f in found]
    if config.base_values.isdisjoint(fingerprints(records).values()):
        base = config.base_name or "not recorded"
        message = f"{path} was trained on other weights of this architecture (base: {base})"
        if strict_base:
            raise ValueError(message + "; pass its own base, or strict_base=False to accept the difference")
        warnings.warn(message, stacklevel=2)
    used = {root: roots[root] for root in {_component(site.name, roots) for site in (f.site for f in found)}}
    name = name or config.name
    adapter = attach_sites(used, method, found, name=name, seed=config.seed, ranks=ranks, fill=fill)
    adapter.strength = strength
    return adapter


def _filling(expected: Mapping[str, tuple], tensors: Mapping[str, Tensor]) -> Callable[[Adapter], None]:
    def fill(adapter: Adapter) -> None:
        own = [tensor for part in adapter.parts for tensor in part.named().values()]
        for tensor, key in zip(own, expected, strict=True):
            tensor.data.copy_(tensors[key])

    return fill


def read_metadata(path: str | Path) -> dict[str, object]:
    """The header of an adapter file, its JSON decoded; the tensors are checked against their hash.

    For files of other tools: their header, and under ``adapter`` what was found in them.
    """
    if not is_own(path):
        return {key: _decode(value) for key, value in open_foreign(path).summary().items()}
    header, _ = _read(Path(path))
    config = read_configuration(header.get("adapter"), path).whole
    return {key: _decode(value) for key, value in header.items()} | {"adapter": config}


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    header, tensors = read_tensors(path)
    if header.get("format_version") != str(FORMAT_VERSION):
        version = header.get("format_version")
        raise ValueError(
            f"{path} has format version {version!r}, this diffadapt reads {FORMAT_VERSION}; update it"
        )
    found = checksums(tensors, header.get("adapter", ""))
    if header.get("sha256") != found["sha256"]:
        raise ValueError(f"{path} was altered or damaged: its tensors do not match their SHA-256")
    if header.get("adapter_sha256", found["adapter_sha256"]) != found["adapter_sha256"]:
        raise ValueError(f"{path} was altered or damaged: its configuration does not match its SHA-256")
    return header, tensors


def is_own(path: str | Path) -> bool:
    """Whether a file says it is one of ours."""
    return read_header(Path(path)).get("format") == "diffadapt"


def _describe(site: Site, adapter: Adapter) -> dict[str, object]:
    component = _component(site.name, adapter.roots)
    path = site.name.removeprefix(f"{component}.") if component else site.name
    rank = {"rank": adapter.ranks[site.name]} if site.name in adapter.ranks else {}
    return {"component": component, "path": path, "shape": list(site.shape), **rank}


def _component(name: str, roots: Mapping[str, nn.Module]) -> str:
    return "" if "" in roots else name.partition(".")[0]


def _match(
    roots: Mapping[str, nn.Module], stored: Sequence[StoredSite], path: str | Path
) -> tuple[list[Found], dict[str, int], list[str]]:
    """The target's layers for the stored sites in order, the ranks by new name, and the stored names."""
    found: dict[tuple[str, str], Found] = {}
    for component in dict.fromkeys(component for component, *_ in stored):
        root = _root_for(component, roots, path)
        wanted = {name: True for own, name, *_ in stored if own == component}
        try:
            chosen = choose(roots[root], wanted, f"{root}." if root else "")
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
    denoiser = next((root for root in roots if not root.startswith("text_encoder")), None)
    if denoiser is not None and not component.startswith("text_encoder"):
        return denoiser  # saved from a bare model and loaded into a pipeline, or the other way
    raise ValueError(f"{path} changes the {component!r} of a pipeline; load it into one that has it")


def _expected(
    method: Method, found: Sequence[Found], ranks: Mapping[str, int], names: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the file's tensors by their names in it."""
    sites = [replace(choice.site, name=name) for choice, name in zip(found, names, strict=True)]
    renamed = {
        new: ranks[choice.site.name]
        for choice, new in zip(found, names, strict=True)
        if choice.site.name in ranks
    }
    return {key: shape for plan in plan_parts(method, sites, renamed) for key, shape in plan.stored().items()}


def _check_tensors(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], path: str | Path
) -> None:
    for key, shape in expected.items():
        if key not in tensors:
            raise ValueError(f"{path} lacks the tensor {key!r}{near(key, tensors)}")
        if tuple(tensors[key].shape) != shape:
            raise ValueError(f"{path}: {key} has shape {tuple(tensors[key].shape)}, expected {shape}")
    for key in tensors:
        if key not in expected:
            raise ValueError(f"{path} holds a tensor {key!r} that its method does not have")
    check_numbers(tensors, path)


def _decode(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
