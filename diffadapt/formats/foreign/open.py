"""A file or folder of another tool, read and understood but not yet attached to a model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from diffadapt.common.safetensors_file import check_finite, hash_tensors, read_tensors
from diffadapt.formats.foreign import diffusers, kohya, peft
from diffadapt.formats.foreign.stored_change import Form

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
REMEDY = (
    "it is a pickle, which can run code when opened; convert it to safetensors where you trust it, e.g. "
    "safetensors.torch.save_file(torch.load(path, weights_only=True), 'new.safetensors')"
)


@dataclass(frozen=True)
class Foreign:
    """What another tool trained.

    Attributes:
        path: of the file read.
        family: kohya, diffusers or peft.
        forms: by the name of the layer in the file.
        header: the file's own metadata.
        sha256: over the tensors.
    """

    path: Path
    family: str
    forms: dict[str, Form]
    header: dict[str, str] = field(default_factory=dict)
    sha256: str = ""

    def summary(self) -> dict[str, object]:
        """What is in it, in the layout of our own files' metadata."""
        counts = Counter(map(_kind, self.forms.values()))
        ranks = sorted({form.rank for form in self.forms.values() if form.rank is not None})
        options = {"family": self.family, "forms": dict(counts), "ranks": ranks}
        return {
            **self.header,
            "format": self.family,
            "sha256": self.sha256,
            "adapter": {
                "method": [{"name": "imported", "options": options}],
                "sites": sorted(self.forms),
                "base": {"name": self.header.get("diffadapt.base")},  # of our own exports
            },
        }


def open_foreign(path: str | Path) -> Foreign:
    """Read a file or folder of another tool.

    Raises: FileNotFoundError; ValueError for pickles, for files that cannot be read, and for files with keys
        of no known kind of adapter, naming them.
    """
    path = Path(path)
    file, config = _choose(path)
    header, tensors = read_tensors(file)
    check_finite(tensors, file)
    try:
        if config is not None:
            family, forms = "peft", peft.read(tensors, config, file)
        elif diffusers.recognised(tensors):
            family, forms = "diffusers", diffusers.read(tensors, header, file)
        else:
            family, forms = "kohya", kohya.read(tensors, header, file)
    except ValueError as error:
        if str(file.parent) in str(error):  # names the file, or the configuration beside it
            raise
        raise ValueError(f"{file}: {error}") from error
    return Foreign(file, family, forms, header, hash_tensors(tensors))


def _choose(path: Path) -> tuple[Path, Path | None]:
    """The file with the tensors, and the configuration of a PEFT folder."""
    if path.is_dir():
        if (path / peft.CONFIG).is_file():
            return _stored(path / peft.TENSORS), path / peft.CONFIG
        return _stored(path / diffusers.TENSORS), None
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    if path.suffix in PICKLES:
        raise ValueError(f"{path} is not opened: {REMEDY}")
    beside = path.with_name(peft.CONFIG)
    return path, beside if path.name == peft.TENSORS and beside.is_file() else None


def _stored(path: Path) -> Path:
    if path.is_file():
        return path
    pickle = path.with_suffix(".bin")
    if pickle.is_file():
        raise ValueError(f"{pickle} is not opened: {REMEDY}")
    raise FileNotFoundError(
        f"no adapter file in {path.parent}: neither {peft.CONFIG} with {peft.TENSORS} nor "
        f"{diffusers.TENSORS}; give the adapter file itself"
    )


def _kind(form: Form) -> str:
    """The form's name, and how it is decomposed."""
    axes = {
        "magnitude": "magnitudes of outputs",
        "base_magnitude": "magnitudes of outputs",
        "input_magnitude": "magnitudes of inputs",
    }
    return " with ".join([form.form, *(said for key, said in axes.items() if key in form.tensors)])
