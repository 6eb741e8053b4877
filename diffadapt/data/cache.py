"""Encoded pictures and captions, kept under a hash of everything they follow from.

The key of a picture names the file's content, the autoencoder, the size, the cut and the mirroring; that of a
caption its text, the text encoders, the tokenizers and what the pipeline makes of an empty caption. So
another base, or a picture that was edited, never finds an old entry, and any number of runs can share one
folder. An entry holds what an autoencoder gives for a picture (moments, not a sample), so every draw from it
is new.
"""

import hashlib
import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from diffadapt.common.atomic_files import write_atomically
from diffadapt.common.safetensors_file import hash_tensors, read_tensors

FORMAT = 2  # of entries; a change in how pictures are read or scaled must raise it
KINDS = ("memory", "disk", "none")
PASSING_SETTINGS = ("transformers_version", "dtype", "torch_dtype")  # of a configuration; change no result
TOKENIZER_SETTINGS = (  # beside the rules of its backend
    "model_max_length",
    "padding_side",
    "truncation_side",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "unk_token_id",
)

Entry = dict[str, Tensor]  # what one key holds, by name


class MemoryCache:
    """Entries of this run."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def get(self, key: str) -> Entry | None:
        return self._entries.get(key)

    def put(self, key: str, entry: Entry) -> None:
        self._entries[key] = entry


class DiskCache:
    """A folder of entries, one safetensors file each, checked whenever it is read.

    Files are written under a temporary name and renamed: runs that share the folder see whole entries only.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def get(self, key: str) -> Entry | None:
        """The entry, or None where there is none; a damaged one is reported and counts as missing."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            header, entry = read_tensors(path)
        except (ValueError, FileNotFoundError) as error:
            tqdm.write(f"cache: {error}; it is made again")
            return None
        if header.get("key") != key or header.get("sha256") != hash_tensors(entry):
            tqdm.write(f"cache: {path} holds other bytes than were written; it is made again")
            return None
        return entry

    def put(self, key: str, entry: Entry) -> None:
        entry = {name: value.detach().cpu().contiguous() for name, value in entry.items()}
        header = {"key": key, "sha256": hash_tensors(entry)}
        write_atomically(self._path(key), lambda path: save_file(entry, path, metadata=header))

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def open_cache(kind: str, folder: str | Path | None = None) -> MemoryCache | DiskCache | None:
    """The cache of that kind (one of KINDS); None keeps nothing.

    Raises: ValueError for "disk" without a folder, a folder without "disk", or an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"--cache_latents must be one of {', '.join(KINDS)}, got {kind!r}")
    if (kind == "disk") != (folder is not None):
        raise ValueError("--cache_latents disk and --cache_dir FOLDER belong together; give both or neither")
    if kind == "disk":
        return DiskCache(folder)
    return MemoryCache() if kind == "memory" else None


def cache_key(**parts: object) -> str:
    """The name of an entry: a hash over everything its content follows from."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(*parts: object) -> str:
    """SHA-256 over the weights and settings of modules, and all that tokenizers make of words."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(f"{type(part).__name__}|{_settings(part)}|".encode())
        if isinstance(part, nn.Module):
            weights = {name: value.detach().cpu() for name, value in part.state_dict().items()}
            hasher.update(hash_tensors(weights).encode())
        if isinstance(part, PreTrainedTokenizerBase):
            hasher.update(_words(part).encode())
    return hasher.hexdigest()


def _words(tokenizer: PreTrainedTokenizerBase) -> str:
    """Vocabulary, merges, normalization, special tokens, padding and length of a tokenizer."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    last_call = ("padding", "truncation")  # what the last caller asked for
    rules = {name: value for name, value in rules.items() if name not in last_call}
    own = {name: getattr(tokenizer, name) for name in TOKENIZER_SETTINGS}
    return json.dumps([rules, own], sort_keys=True)


def _settings(part: object) -> str:
    """The configuration of a module, without what tells where and with what version it was stored."""
    config = getattr(part, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    kept = {k: v for k, v in values.items() if k[0] != "_" and k not in PASSING_SETTINGS}
    return json.dumps(kept, sort_keys=True, default=str)
