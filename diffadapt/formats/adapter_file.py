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
from diffadapt.adapters.fingerprint import fingerprints, quantisation
from diffadapt.adapters.layers import layer_state_of
from diffadapt.adapters.peft_bridge import fill_from_file
from diffadapt.adapters.targets import TargetSite
from diffadapt.common.atomic_files import write_atomically
from diffadapt.common.pipeline_components import is_text_encoder
from diffadapt.common.safetensors_file import check_finite, checksums, read_header, read_tensors
from diffadapt.formats.adapter_header import Configuration, StoredSite, read_configuration
from diffadapt.formats.adapter_layout import check_tensors, expected_tensors, match_sites
from diffadapt.formats.foreign import attach_foreign, open_foreign
from diffadapt.methods import Method
from diffadapt.methods.parse_method import read_method
from diffadapt.methods.peft_limits import check_sizes
from diffadapt.methods.site import Site

FORMAT_VERSION = 1


def save(
    adapter: Adapter, path: str | Path, *, base: str | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes an adapter with its configuration and the fingerprint of its base.

    Args:
        base: name or path of the base, recorded for whoever loads the file.
        metadata: further text to keep in the file's header, e.g. a training summary.
    """
    tensors = {}
    for part in adapter.parts:
        for key, tensor in part.named_tensors().items():
            tensors[key] = tensor.detach().cpu().contiguous()
    sites = [_stored_site(site, adapter) for site in adapter.sites]
    layer_states = list(adapter.layer_states.values())
    # a sharded base cannot be read now: the adapter has its fingerprints from before
    values = adapter.base_values or fingerprints(layer_states)
    description = {"name": base, **values}
    if quantisation(layer_states) is not None:
        description["quantisation"] = quantisation(layer_states)
    write_adapter_file(
        path,
        tensors,
        name=adapter.name,
        seed=adapter.seed,
        method=adapter.method,
        sites=sites,
        base=description,
        metadata=metadata,
    )


def write_adapter_file(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    seed: int,
    method: Method,
    sites: Sequence[StoredSite],
    base: Mapping[str, str | None],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file in our own format.

    Args:
        tensors: by the names that `MethodPlan.stored_shapes` gives them.
        name: of the adapter.
        seed: of the method's constants.
        base: `name` of the base, its fingerprints, and how it is quantised where it is.
        metadata: further text to keep in the header.
    """
    methods = []
    for member in method.members:
        methods.append({"name": member.name, "options": member.settings})
    config = {
        "name": name,
        "seed": seed,
        "method": methods,
        "sites": [_site_entry(site) for site in sites],
        "base": dict(base),
    }
    configuration = json.dumps(config)
    # what the reader relies on comes last: no entry of `metadata` replaces it
    header = {
        **(metadata or {}),
        "format": "diffadapt",
        "format_version": str(FORMAT_VERSION),
        "adapter": configuration,
        **checksums(tensors, configuration),
    }
    write_atomically(path, lambda temporary: save_file(dict(tensors), temporary, header))


def load(
    model: object,
    path: str | Path,
    *,
    strength: float = 1.0,
    name: str | None = None,
    strict_base: bool = False,
) -> Adapter:
    """Attaches the adapter of a file to a model or pipeline: our own, or another tool's.

    Args:
        strength: t in `W + t (W' - W)`.
        name: of the adapter; the file's own by default.
        strict_base: make a base with other values than it was trained on an error, not a warning.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, altered, of another version or of another architecture (naming the
            first name or shape that does not fit). The model is then as before.
    """
    if not is_own(path):
        foreign = open_foreign(path)
        return attach_foreign(model, foreign, name=name or "default", strength=strength)
    config, tensors = read_adapter_file(path)
    method = read_method(config.method)
    roots = components(model, any(is_text_encoder(site.component) for site in config.sites))
    targets = match_sites(roots, config.sites, path)
    # everything that can fail comes before the model is touched
    fill = _checked_filling(method, targets, config.sites, tensors, path)
    _check_base(config, targets, path, strict=strict_base)
    changed_roots = {}
    ranks = {}
    for target, stored in zip(targets, config.sites, strict=True):
        root = _component(target.site.name, roots)
        changed_roots[root] = roots[root]
        if stored.rank is not None:
            ranks[target.site.name] = stored.rank
    name = name or config.name
    adapter = attach_sites(
        changed_roots, method, targets, name=name, seed=config.seed, ranks=ranks, fill=fill
    )
    adapter.strength = strength
    return adapter


def read_metadata(path: str | Path) -> dict[str, object]:
    """The header of an adapter file, its JSON decoded; the tensors are checked against their hash.

    For files of other tools: their header, and under `adapter` what was found in them.
    """
    if not is_own(path):
        return {key: _decoded(value) for key, value in open_foreign(path).summary().items()}
    header, _ = _read_checked(Path(path))
    metadata = {key: _decoded(value) for key, value in header.items()}
    metadata["adapter"] = read_configuration(header.get("adapter"), path).json
    return metadata


def read_adapter_file(path: str | Path) -> tuple[Configuration, dict[str, Tensor]]:
    """Configuration and tensors of a file in our own format.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, altered, or of another version.
    """
    header, tensors = _read_checked(Path(path))
    return read_configuration(header.get("adapter"), path), tensors


def base_named_in(paths: Sequence[str]) -> str:
    """The base that all files name.

    Raises:
        ValueError: one names none, or they differ.
    """
    bases: dict[str, str] = {}  # by the file that names them
    for path in paths:
        base = read_metadata(path)["adapter"]["base"]["name"]
        if base is None:
            raise ValueError(f"{path} does not name its base; give it with --base")
        bases[path] = base
    if len(set(bases.values())) > 1:
        listed = ", ".join(f"{path}: {base}" for path, base in bases.items())
        raise ValueError(f"the adapters were trained on different bases ({listed}); choose one with --base")
    return next(iter(bases.values()))


def is_own(path: str | Path) -> bool:
    """Whether a file says that it is in our own format."""
    return read_header(Path(path)).get("format") == "diffadapt"


def _read_checked(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a file in our own format, which agree with its hashes."""
    header, tensors = read_tensors(path)
    version = header.get("format_version")
    if version != str(FORMAT_VERSION):
        raise ValueError(
            f"{path} has format version {version!r}, this diffadapt reads {FORMAT_VERSION}; update it"
        )
    hashes = checksums(tensors, header.get("adapter", ""))
    if header.get("sha256") != hashes["sha256"]:
        raise ValueError(f"{path} was altered or damaged: its tensors do not match their SHA-256")
    # files written by the first versions have no hash of their configuration
    if header.get("adapter_sha256", hashes["adapter_sha256"]) != hashes["adapter_sha256"]:
        raise ValueError(f"{path} was altered or damaged: its configuration does not match its SHA-256")
    return header, tensors


def _checked_filling(
    method: Method,
    targets: Sequence[TargetSite],
    stored_sites: Sequence[StoredSite],
    tensors: Mapping[str, Tensor],
    path: str | Path,
) -> Callable[[Adapter], None]:
    """A function that fills a new adapter, once the file's tensors are known to be those of its method."""
    if method.library == "diffadapt":
        expected = expected_tensors(method, targets, stored_sites)
        check_tensors(expected, tensors, path)
        return _filling(expected, tensors)
    # PEFT's library makes the tensors itself: what a hostile file could make it allocate is limited first
    widest = max(sum(target.site.shape) for target in targets)
    num_values = sum(tensor.numel() for tensor in tensors.values())
    check_sizes(method.name, method.options, widest, num_values)
    check_finite(tensors, path)
    return fill_from_file(tensors, path)


def _filling(keys: Sequence[str], tensors: Mapping[str, Tensor]) -> Callable[[Adapter], None]:
    """A function that copies tensors into those of an adapter, whose order `keys` have."""

    def fill(adapter: Adapter) -> None:
        adapter_tensors: list[Tensor] = []
        for part in adapter.parts:
            adapter_tensors += part.named_tensors().values()
        # by position: the names in the file are those of the model it was saved from
        for tensor, key in zip(adapter_tensors, keys, strict=True):
            tensor.data.copy_(tensors[key])

    return fill


def _check_base(
    config: Configuration, targets: Sequence[TargetSite], path: str | Path, *, strict: bool
) -> None:
    """Warns, or raises ValueError, where the layers are not those of the base in the file."""
    layer_states = [layer_state_of(target.layers) for target in targets]
    # a file has one fingerprint for each precision: the same base in half precision is the same base
    if not config.base_values.isdisjoint(fingerprints(layer_states).values()):
        return
    base = config.base_name or "not recorded"
    stored_as = quantisation(layer_states)
    if stored_as != config.base_quantisation:
        trained_as = _quantisation_text(config.base_quantisation)
        message = (
            f"{path} was trained on weights that are {trained_as} (base: {base}), and here they are "
            f"{_quantisation_text(stored_as)}: the adapter fits, but the weights are rounded otherwise, so "
            "its effect differs a little, and whether the model is the same cannot be told"
        )
        if strict:
            raise ValueError(message + "; load the base as in training, or pass strict_base=False")
        warnings.warn(message, stacklevel=3)
        return
    message = f"{path} was trained on other weights of this architecture (base: {base})"
    if strict:
        raise ValueError(message + "; pass its own base, or strict_base=False to accept the difference")
    warnings.warn(message, stacklevel=3)


def _quantisation_text(name: str | None) -> str:
    return "not quantised" if name is None else f"quantised ({name})"


def _stored_site(site: Site, adapter: Adapter) -> StoredSite:
    component = _component(site.name, adapter.roots)
    path = site.name.removeprefix(f"{component}.") if component else site.name
    return StoredSite(component, path, site.shape, adapter.ranks.get(site.name))


def _site_entry(site: StoredSite) -> dict[str, object]:
    entry = {"component": site.component, "path": site.path, "shape": list(site.shape)}
    if site.rank is not None:
        entry["rank"] = site.rank
    return entry


def _component(site_name: str, roots: Mapping[str, nn.Module]) -> str:
    return "" if "" in roots else site_name.partition(".")[0]


def _decoded(value: object) -> object:
    """A value of a header, from JSON where it is JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
