"""Caches of encoded images and captions, under a hash of everything that an encoding depends on.

The key of an image covers the content of its file, the autoencoder, the size, the crop and the mirroring;
that of a caption covers its text, the text encoders, the tokenizers and the pipeline's treatment of empty
captions. So another base, or an edited image, never finds an old entry, and any number of runs can share a
folder. For an image the cache holds the moments of the autoencoder and not a sample, so that every use
samples anew.
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

FORMAT = 2  # part of every key; raise it when images are read or scaled in another way
KINDS = ("memory", "disk", "none")
IRRELEVANT_SETTINGS = ("transformers_version", "dtype", "torch_dtype")  # of a configuration; change no result
TOKENIZER_SETTINGS = (  # in addition to the rules of the tokenizer's backend
    "model_max_length",
    "padding_side",
    "truncation_side",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "unk_token_id",
    "chat_template",
)
PER_CALL_RULES = ("padding", "truncation")  # rules of a backend that the latest call has set

Entry = dict[str, Tensor]  # the content of one key, by name


class MemoryCache:
    """A cache in memory, for one run."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def get(self, key: str) -> Entry | None:
        """The entry, or None if there is none."""
        return self._entries.get(key)

    def put(self, key: str, entry: Entry) -> None:
        """Stores an entry."""
        self._entries[key] = entry


class DiskCache:
    """A cache in a folder, with a safetensors file for each entry, which is checked whenever it is read.

    Files are written under a temporary name and renamed, so that runs that share the folder see complete
    entries only.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def get(self, key: str) -> Entry | None:
        """The entry, or None if there is none. A damaged entry is reported and counts as missing."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            header, entry = read_tensors(path)
        except (ValueError, FileNotFoundError) as error:
            tqdm.write(f"cache: {error}; it is encoded again")
            return None
        # the key too: a file may have been renamed, or copied over another
        if header.get("key") != key or header.get("sha256") != hash_tensors(entry):
            tqdm.write(f"cache: {path} does not hold what was written to it; it is encoded again")
            return None
        return entry

    def put(self, key: str, entry: Entry) -> None:
        """Stores an entry."""
        # safetensors stores contiguous tensors only
        entry = {name: value.detach().cpu().contiguous() for name, value in entry.items()}
        header = {"key": key, "sha256": hash_tensors(entry)}
        write_atomically(self._path(key), lambda path: save_file(entry, path, metadata=header))

    def _path(self, key: str) -> Path:
        # Subfolders by the first two digits keep the folders small.
        return self.folder / key[:2] / f"{key}.safetensors"


def open_cache(kind: str, folder: str | Path | None = None) -> MemoryCache | DiskCache | None:
    """Opens a cache.

    Args:
        kind: "memory", "disk" or "none".
        folder: the folder of a cache on disk.

    Returns:
        The cache; None for "none".

    Raises:
        ValueError: the kind is unknown, or it does not fit the folder.
    """
    if kind not in KINDS:
        raise ValueError(f"--cache_latents must be one of {', '.join(KINDS)}, got {kind!r}")
    if (kind == "disk") != (folder is not None):
        raise ValueError("--cache_latents disk and --cache_dir FOLDER belong together; give both or neither")
    if kind == "disk":
        return DiskCache(folder)
    return MemoryCache() if kind == "memory" else None


def cache_key(**parts: object) -> str:
    """The key of an entry: a hash over everything its content depends on."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(*components: object) -> str:
    """SHA-256 over the weights and configurations of modules, and everything tokenizers depend on."""
    hasher = hashlib.sha256()
    for component in components:
        hasher.update(f"{type(component).__name__}|{_configuration(component)}|".encode())
        if isinstance(component, nn.Module):
            weights = {}
            for name, value in component.state_dict().items():
                weights[name] = value.detach().cpu()
            hasher.update(hash_tensors(weights).encode())
        if hasattr(component, "tokenizer"):  # a processor of texts and images, with a template of its own
            hasher.update(f"{getattr(component, 'chat_template', None)}|".encode())
            component = component.tokenizer
        if isinstance(component, PreTrainedTokenizerBase):
            hasher.update(_tokenizer_rules(component).encode())
    return hasher.hexdigest()


def _tokenizer_rules(tokenizer: PreTrainedTokenizerBase) -> str:
    """Vocabulary, merges, normalization, special tokens, padding and length of a tokenizer, as JSON."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in PER_CALL_RULES:
        rules.pop(name, None)
    settings = {name: getattr(tokenizer, name) for name in TOKENIZER_SETTINGS}
    return json.dumps([rules, settings], sort_keys=True)


def _configuration(component: object) -> str:
    """The configuration of a component as JSON, without what changes no result."""
    config = getattr(component, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    relevant = {}
    for name, value in values.items():
        if not name.startswith("_") and name not in IRRELEVANT_SETTINGS:
            relevant[name] = value
    return json.dumps(relevant, sort_keys=True, default=str)
