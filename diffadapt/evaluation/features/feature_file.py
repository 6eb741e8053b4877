"""A set's features in one safetensors file: the cache, saved references, and what comparisons read.

Tensors: each layer (N, D). Metadata: one JSON text under "evaluation" with the identity of the extractor, the
facts of every image in the order of the rows, and the SHA-256 of the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffadapt.common.atomic_files import write_atomically
from diffadapt.common.safetensors_file import hash_tensors
from diffadapt.evaluation.sets.image_files import Facts

KEY = "evaluation"  # in the metadata
VERSION = 1  # of the format, and of everything between a file's bytes and its features


@dataclass(frozen=True)
class SetFeatures:
    """Features of a set under one extractor. `identity`: name, sha256, preset, side, dtype, version."""

    identity: Mapping[str, object]
    layers: Mapping[str, Tensor]
    facts: tuple[Facts, ...]


def file_name(extractor: str) -> str:
    """How the file of an extractor's features is called in a folder of several."""
    return f"{extractor.replace('/', '_').replace(':', '-')}.safetensors"


def write_features(path: Path, content: SetFeatures) -> None:
    """Atomically. Raises: OSError where it cannot be written."""
    tensors = {name: tensor.contiguous() for name, tensor in content.layers.items()}
    stored = {
        "version": VERSION,
        "identity": dict(content.identity),
        "facts": [asdict(facts) for facts in content.facts],
        "tensors": hash_tensors(tensors),
    }
    write_atomically(path, lambda temporary: save_file(tensors, temporary, {KEY: json.dumps(stored)}))


def read_features(path: Path) -> SetFeatures:
    """Raises: ValueError for any file that is not whole or was not written by `write_features`."""
    try:
        with safe_open(path, framework="pt") as file:
            stored = json.loads((file.metadata() or {})[KEY])
            layers = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = tuple(
            Facts(**{**row, "conversions": tuple(row.get("conversions", ()))}) for row in stored["facts"]
        )
        version, identity, sha256 = (stored[name] for name in ("version", "identity", "tensors"))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no features of this program, or not all of them: {error}") from None
    if version != VERSION:
        raise ValueError(f"{path} was written by version {version!r} of the format, this is {VERSION}")
    if hash_tensors(layers) != sha256:
        raise ValueError(f"{path} is damaged: its features do not hash to what it says; make it again")
    if any(len(rows) != len(facts) for rows in layers.values()):
        raise ValueError(f"{path} is damaged: {len(facts)} images, but other numbers of rows")
    return SetFeatures(identity, layers, facts)


def by_digest(content: SetFeatures, digests: Sequence[str], names: Sequence[str]) -> SetFeatures:
    """The rows in the order of `digests`, under new names: files may be renamed, equals have equal rows."""
    place = {facts.sha256: index for index, facts in enumerate(content.facts)}
    rows = [place[digest] for digest in digests]
    facts = (Facts(**{**asdict(content.facts[r]), "name": n}) for r, n in zip(rows, names, strict=True))
    return SetFeatures(
        content.identity, {name: tensor[rows] for name, tensor in content.layers.items()}, tuple(facts)
    )
