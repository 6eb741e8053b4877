"""A set's features in one safetensors file: the cache, saved references, and the input of comparisons.

Tensors: each layer (N, D). Metadata: one JSON text under "evaluation" with the identity of the extractor,
information about every image in the order of the rows, and the SHA-256 of the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffadapt.common.atomic_files import write_atomically
from diffadapt.common.safetensors_file import hash_tensors
from diffadapt.evaluation.sets.image_files import ImageInfo

KEY = "evaluation"  # in the metadata
VERSION = 1  # of the format, and of everything between a file's bytes and its features


@dataclass(frozen=True)
class SetFeatures:
    """Features of a set under one extractor.

    Attributes:
        identity: everything about the extractor that its features depend on; see `cache.identity_of`.
        layers: layer -> (N, D).
        infos: of each image, in the order of the rows.
    """

    identity: Mapping[str, object]
    layers: Mapping[str, Tensor]
    infos: tuple[ImageInfo, ...]


def file_name(extractor: str) -> str:
    """The name of the file of an extractor's features, in a folder for several extractors."""
    return f"{extractor.replace('/', '_').replace(':', '-')}.safetensors"


def write_features(path: Path, content: SetFeatures) -> None:
    """Writes a set's features atomically.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {}
    for name, tensor in content.layers.items():
        tensors[name] = tensor.contiguous()  # safetensors refuses views
    metadata = {
        "version": VERSION,
        "identity": dict(content.identity),
        "facts": [asdict(info) for info in content.infos],
        "tensors": hash_tensors(tensors),
    }
    write_atomically(path, lambda temporary: save_file(tensors, temporary, {KEY: json.dumps(metadata)}))


def read_features(path: Path) -> SetFeatures:
    """Reads a file of `write_features`.

    Raises:
        ValueError: the file is damaged, of another version, or of another program.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})[KEY])
            layers = {}
            for name in file.keys():  # noqa: SIM118 (not a dict)
                layers[name] = file.get_tensor(name)
        version = metadata["version"]
        identity = metadata["identity"]
        sha256 = metadata["tensors"]
        infos = tuple(_image_info(fields) for fields in metadata["facts"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no features of this program, or not all of them: {error}") from None
    if version != VERSION:
        raise ValueError(f"{path} was written by version {version!r} of the format, this is {VERSION}")
    if hash_tensors(layers) != sha256:
        raise ValueError(f"{path} is damaged: the hash of its features differs; extract them again")
    for rows in layers.values():
        if len(rows) != len(infos):
            raise ValueError(f"{path} is damaged: {len(infos)} images, but other numbers of rows")
    return SetFeatures(identity, layers, infos)


def reorder_by_digest(content: SetFeatures, digests: Sequence[str], names: Sequence[str]) -> SetFeatures:
    """The rows in the order of other files with the same contents.

    Args:
        content: features of files with these contents, in any order and under any names.
        digests: SHA-256 of each file.
        names: the new name of each file.
    """
    row_of = {info.sha256: row for row, info in enumerate(content.infos)}
    rows = []
    infos = []
    for sha256, name in zip(digests, names, strict=True):
        row = row_of[sha256]
        rows.append(row)
        infos.append(replace(content.infos[row], name=name))
    layers = {layer: tensor[rows] for layer, tensor in content.layers.items()}
    return SetFeatures(content.identity, layers, tuple(infos))


def _image_info(fields: dict) -> ImageInfo:
    """From JSON, which has lists instead of tuples."""
    conversions = tuple(fields.get("conversions", ()))
    return ImageInfo(**{**fields, "conversions": conversions})
