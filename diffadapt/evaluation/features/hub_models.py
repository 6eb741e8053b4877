"""Models of the Hugging Face hub as local folders: from a folder, the cache, or downloaded when allowed."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from diffadapt.evaluation.features.weight_files import sha256_of
from diffadapt.models.base_names import is_embedded, resolve

PATTERNS = ("*.json", "*.txt", "*.safetensors")  # no pickled weights


def folder_of(
    name: str, *, given: Mapping[str, Path], extractor: str, download: bool, available: list[str]
) -> Path:
    """Where a model's files are: an embedded name, a folder, `--weights`, or the cache of the hub.

    Files of the cache are links to blobs named by their SHA-256, which is checked.

    Raises: FileNotFoundError that names the model, its source and the remedies; ValueError for damaged files.
    """
    if is_embedded(name):
        return Path(resolve(name))
    local = given.get(extractor) or Path(name)
    if local.is_dir():
        require_safetensors(local)
        return local
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(PATTERNS), local_files_only=True))
        if not list(folder.glob("*.safetensors")):
            raise FileNotFoundError(f"{folder} holds no .safetensors file")
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
    for path in folder.glob("*.safetensors"):
        check_blob(path)
    return folder


def require_safetensors(folder: Path) -> None:
    """Raises: FileNotFoundError for a folder of a model without .safetensors, with the remedies."""
    if list(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt*")))
    held = f"only {', '.join(pickled)}, which may run code when it is read" if pickled else "no weights"
    raise FileNotFoundError(
        f"{folder} holds no .safetensors, {held}\n"
        "  take another revision or copy of the model that has model.safetensors; or, where the source is "
        "trusted, convert it once:\n"
        f"  python -c \"from transformers import AutoModel; AutoModel.from_pretrained('{folder}')"
        ".save_pretrained('NEW_FOLDER')\", copy the .json and .txt files into it, and give --weights "
        "EXTRACTOR=NEW_FOLDER"
    )


def _download(name: str) -> Path:
    print(f"downloading from https://huggingface.co/{name}", file=sys.stderr)
    for file in HfApi().model_info(name, files_metadata=True).siblings or []:
        if Path(file.rfilename).suffix in (".json", ".txt", ".safetensors"):
            sha256 = f", sha256 {file.lfs.sha256}" if file.lfs else ""
            print(f"  {file.rfilename}: {(file.size or 0) / 2**20:.1f} MiB{sha256}", file=sys.stderr)
    return Path(snapshot_download(name, allow_patterns=list(PATTERNS)))


def check_blob(path: Path) -> None:
    """In the cache a large file is a link to one named by its SHA-256: they must agree.

    Raises: ValueError when the bytes are not those of the name.
    """
    blob = path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        found = sha256_of(blob)
        if found != blob.name:
            raise ValueError(
                f"{path} is damaged: sha256 {found}, not {blob.name}; remove it and fetch it again"
            )
