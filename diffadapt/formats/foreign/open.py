"""A file or folder of another tool, read and understood but not yet attached to a model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from diffadapt.common.safetensors_file import check_finite, hash_tensors, read_tensors
from diffadapt.formats.foreign import diffusers, kohya, peft
from diffadapt.formats.foreign.keys import check_supported
from diffadapt.formats.foreign.stored_change import StoredChange

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
REMEDY = (
    "it is a pickle, which can run code when opened; convert it to safetensors where you trust it, e.g. "
    "safetensors.torch.save_file(torch.load(path, weights_only=True), 'new.safetensors')"
)
_MAGNITUDES = {
    "magnitude": "magnitudes of outputs",
    "base_magnitude": "magnitudes of outputs",
    "input_magnitude": "magnitudes of inputs",
}


@dataclass(frozen=True)
class ForeignAdapter:
    """An adapter that another tool trained.

    Attributes:
        path: of the file read.
        format: kohya, diffusers or peft.
        changes: by the name of the layer in the file.
        header: the file's own metadata.
        sha256: over the tensors.
    """

    path: Path
    format: str
    changes: dict[str, StoredChange]
    header: dict[str, str] = field(default_factory=dict)
    sha256: str = ""

    def summary(self) -> dict[str, object]:
        """The contents in the layout of our own files' metadata."""
        forms = Counter(_describe(change) for change in self.changes.values())
        ranks = {change.rank for change in self.changes.values()} - {None}
        options = {"family": self.format, "forms": dict(forms), "ranks": sorted(ranks)}
        return {
            **self.header,
            "format": self.format,
            "sha256": self.sha256,
            "adapter": {
                "method": [{"name": "imported", "options": options}],
                "sites": sorted(self.changes),
                "base": {"name": self.header.get("diffadapt.base")},  # of our own exports
            },
        }


def open_foreign(path: str | Path) -> ForeignAdapter:
    """Reads a file or folder of another tool.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a pickle, cannot be read, or has keys of no known kind of adapter, which are named.
    """
    file, peft_config = _find_file(Path(path))
    header, tensors = read_tensors(file)
    # checkpoints hold whole numbers, such as CLIP's position_ids, which would be named instead
    check_supported([key for key, tensor in tensors.items() if not tensor.is_floating_point()], file)
    check_finite(tensors, file)
    try:
        if peft_config is not None:
            file_format = "peft"
            changes = peft.read(tensors, peft_config, file)
        elif diffusers.has_diffusers_keys(tensors):
            file_format = "diffusers"
            changes = diffusers.read(tensors, header, file)
        else:
            file_format = "kohya"
            changes = kohya.read(tensors, header, file)
    except ValueError as error:
        if str(file) in str(error) or str(peft_config) in str(error):
            raise
        raise ValueError(f"{file}: {error}") from error
    return ForeignAdapter(file, file_format, changes, header, hash_tensors(tensors))


def _find_file(path: Path) -> tuple[Path, Path | None]:
    """The file with the tensors, and the configuration beside it where they are PEFT's."""
    if path.is_dir():
        if (path / peft.CONFIG).is_file():
            return _existing(path / peft.TENSORS), path / peft.CONFIG
        return _existing(path / diffusers.TENSORS), None
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    if path.suffix in PICKLES:
        raise ValueError(f"{path} is not opened: {REMEDY}")
    config = path.with_name(peft.CONFIG)
    if path.name == peft.TENSORS and config.is_file():
        return path, config
    return path, None


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    pickle = path.with_suffix(".bin")
    if pickle.is_file():
        raise ValueError(f"{pickle} is not opened: {REMEDY}")
    raise FileNotFoundError(
        f"no adapter file in {path.parent}: neither {peft.CONFIG} with {peft.TENSORS} nor "
        f"{diffusers.TENSORS}; give the adapter file itself"
    )


def _describe(change: StoredChange) -> str:
    """The form of a change, and how it is decomposed."""
    parts = [change.form]
    for key, description in _MAGNITUDES.items():
        if key in change.tensors:
            parts.append(description)
    return " with ".join(parts)
