"""Adapter files: one safetensors file that is complete, checked when read, and never unpickled."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.attach import attach_sites, components
from diffadapt.adapters.fingerprint import fingerprints
from diffadapt.adapters.layers import layer_state_of
from diffadapt.adapters.peft_bridge import filling
from diffadapt.adapters.targets import TargetSite
from diffadapt.common.atomic_files import write_atomically
from diffadapt.common.pipeline_components import is_text_encoder
from diffadapt.common.safetensors_file import (
    check_finite,
    checksums,
    read_header,
    read_tensors,
)
from diffadapt.formats.adapter_header import Configuration, read_configuration
from diffadapt.formats.adapter_layout import check_tensors, expected_tensors, match_sites
from diffadapt.formats.foreign import attach_foreign, open_foreign
from diffadapt.methods import Method
from diffadapt.methods.parse_method import read_method
from diffadapt.methods.peft_config import PeftMethod
from diffadapt.methods.peft_limits import check_sizes
from diffadapt.methods.site import Site

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
        for key, tensor in part.named_tensors().items()
    }
    values = adapter.base_values or fingerprints(list(adapter.layer_states.values()))
    config = {
        "name": adapter.name,
        "seed": adapter.seed,
        "method": [{"name": part.name, "options": part.settings} for part in adapter.method.members],
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
    method = read_method(config.method)
    roots = components(model, any(is_text_encoder(site.component) for site in config.sites))
    found, ranks, names = match_sites(roots, config.sites, path)
    fill = _checked_filling(method, found, ranks, names, tensors, path)
    _check_base(config, found, path, strict=strict_base)
    used = {root: roots[root] for root in {_component(choice.site.name, roots) for choice in found}}
    name = name or config.name
    adapter = attach_sites(used, method, found, name=name, seed=config.seed, ranks=ranks, fill=fill)
    adapter.strength = strength
    return adapter


def _checked_filling(
    method: Method,
    found: Sequence[TargetSite],
    ranks: Mapping[str, int],
    names: Sequence[str],
    tensors: Mapping[str, Tensor],
    path: str | Path,
) -> Callable[[Adapter], None]:
    """What fills the new adapter, once the file's tensors are known to be those of its method."""
    if not isinstance(method, PeftMethod):
        expected = expected_tensors(method, found, ranks, names)
        check_tensors(expected, tensors, path)
        return _filling(expected, tensors)
    widest = max(sum(choice.site.shape) for choice in found)
    check_sizes(method.name, method.options, widest, sum(tensor.numel() for tensor in tensors.values()))
    check_finite(tensors, path)
    return filling(tensors, path)


def _check_base(
    config: Configuration, found: Sequence[TargetSite], path: str | Path, *, strict: bool
) -> None:
    """Warns, or raises ValueError, where the layers are not those of the base in the file."""
    layer_states = [layer_state_of(target.layers) for target in found]
    if not config.base_values.isdisjoint(fingerprints(layer_states).values()):
        return
    base = config.base_name or "not recorded"
    message = f"{path} was trained on other weights of this architecture (base: {base})"
    if strict:
        raise ValueError(message + "; pass its own base, or strict_base=False to accept the difference")
    warnings.warn(message, stacklevel=3)


def _filling(expected: Mapping[str, tuple], tensors: Mapping[str, Tensor]) -> Callable[[Adapter], None]:
    def fill(adapter: Adapter) -> None:
        own = [tensor for part in adapter.parts for tensor in part.named_tensors().values()]
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


def base_named_in(paths: Sequence[str]) -> str:
    """The base that all files name. Raises ValueError when one names none or they differ."""
    bases = {path: read_metadata(path)["adapter"]["base"]["name"] for path in paths}
    if None in bases.values():
        nameless = next(path for path, base in bases.items() if base is None)
        raise ValueError(f"{nameless} does not name its base; give it with --base")
    if len(set(bases.values())) > 1:
        listed = ", ".join(f"{path}: {base}" for path, base in bases.items())
        raise ValueError(f"the adapters were trained on different bases ({listed}); choose one with --base")
    return next(iter(bases.values()))


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


def _decode(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
