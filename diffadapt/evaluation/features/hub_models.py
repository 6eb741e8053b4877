"""Models of the Hugging Face hub as local folders: a folder, the hub's cache, or a download where allowed."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from diffadapt.evaluation.features.weight_files import sha256_of
from diffadapt.models.base_names import is_embedded, resolve

SUFFIXES = (".json", ".txt", ".safetensors")  # no pickled weights
PATTERNS = [f"*{suffix}" for suffix in SUFFIXES]


def model_folder(
    name: str, *, weights: Mapping[str, Path], extractor: str, download: bool, available: list[str]
) -> Path:
    """The folder of a model's files.

    Files in the hub's cache are links to blobs named by their SHA-256, which is checked.

    Args:
        name: an embedded name, a folder, or a name on the hub.
        weights: parsed `--weights`, which take precedence.
        extractor: full name of the extractor that needs the model.
        download: whether the model may be downloaded.
        available: extractors that need no download, for the error.

    Raises:
        FileNotFoundError: the model is not on this machine, with its source and the remedies.
        ValueError: files are damaged.
    """
    if is_embedded(name):
        return Path(resolve(name))
    local_folder = weights.get(extractor) or Path(name)
    if local_folder.is_dir():
        require_safetensors(local_folder)
        return local_folder
    try:
        folder = _cached_folder(name)
    except (LocalEntryNotFoundError, FileNotFoundError, ValueError) as error:
        if not download:
            raise FileNotFoundError(
                f"the model of {extractor!r} is not on this machine: no folder {name!r}, and no safetensors "
                f"of it in the cache of the Hugging Face hub (https://huggingface.co/{name})\n"
                f"  give --weights {extractor}=FOLDER with config.json and model.safetensors, or allow "
                f"--download\n"
                f"  available now: {', '.join(available)}"
            ) from error
        folder = _download(name)
        require_safetensors(folder)
    for path in folder.glob("*.safetensors"):  # JSON files are named by git's SHA-1
        check_blob(path)
    return folder


def require_safetensors(folder: Path) -> None:
    """Checks that a model's folder has .safetensors.

    Raises:
        FileNotFoundError: it has none, with the remedies.
    """
    if list(folder.glob("*.safetensors")):
        return
    pickled_paths = [*folder.glob("*.bin"), *folder.glob("*.pt*")]
    pickled = sorted(path.name for path in pickled_paths)
    content = f"only {', '.join(pickled)}, which may run code when it is read" if pickled else "no weights"
    raise FileNotFoundError(
        f"{folder} holds no .safetensors, {content}\n"
        "  take another revision or copy of the model that has model.safetensors; or, where the source is "
        "trusted, convert it once:\n"
        f"  python -c \"from transformers import AutoModel; AutoModel.from_pretrained('{folder}')"
        ".save_pretrained('NEW_FOLDER')\", copy the .json and .txt files into it, and give --weights "
        "EXTRACTOR=NEW_FOLDER"
    )


def check_blob(path: Path) -> None:
    """Checks a file of the hub's cache: a large file is a link to a blob named by its SHA-256.

    Raises:
        ValueError: the bytes have another hash.
    """
    blob = path.resolve()
    is_named_by_hash = blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name)
    if not is_named_by_hash:
        return
    sha256 = sha256_of(blob)
    if sha256 != blob.name:
        raise ValueError(f"{path} is damaged: sha256 {sha256}, not {blob.name}; remove and download it again")


def _cached_folder(name: str) -> Path:
    """A model in the hub's cache. Raises one of several errors where there is none with safetensors."""
    folder = Path(snapshot_download(name, allow_patterns=PATTERNS, local_files_only=True))
    if not list(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder} holds no .safetensors file")
    return folder


def _download(name: str) -> Path:
    """Downloads a model after listing its files, their sizes and hashes."""
    print(f"downloading from https://huggingface.co/{name}", file=sys.stderr)
    for file in HfApi().model_info(name, files_metadata=True).siblings or []:
        if Path(file.rfilename).suffix in SUFFIXES:
            sha256 = f", sha256 {file.lfs.sha256}" if file.lfs else ""
            print(f"  {file.rfilename}: {(file.size or 0) / 2**20:.1f} MiB{sha256}", file=sys.stderr)
    return Path(snapshot_download(name, allow_patterns=PATTERNS))
