"""Features of references, stored on disk under a hash of everything they depend on.

One changed byte in one image, other weights, another preset, layer, precision or version give another file
name.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from diffadapt.evaluation.features.extractors.base import DTYPE, Extractor
from diffadapt.evaluation.features.feature_file import (
    VERSION,
    SetFeatures,
    read_features,
    reorder_by_digest,
    write_features,
)

FOLDER = "DIFFADAPT_CACHE"  # environment variable


def default_folder() -> Path:
    """$DIFFADAPT_CACHE, or diffadapt/features in the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(FOLDER) or Path(user_cache) / "diffadapt" / "features")


def identity_of(extractor: Extractor) -> dict[str, object]:
    """Everything about an extractor that its features depend on."""
    return {
        "extractor": extractor.name,
        "sha256": extractor.sha256,
        "preset": extractor.preset,
        "side": extractor.side,
        "layers": list(extractor.layers),
        "dtype": DTYPE,
        "version": VERSION,
    }


class FeatureCache:
    """Features of sets by their contents.

    A folder that cannot be written to, or a damaged file, gives a warning and does not stop the run.

    Args:
        folder: where the features are stored; None stores nothing.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def path(self, extractor: Extractor, digests: Sequence[str]) -> Path:
        """The file of a set's features.

        Args:
            extractor: the network.
            digests: SHA-256 of each image, in any order.
        """
        # sorted: the order and the names of images change no features
        content = json.dumps({**identity_of(extractor), "images": sorted(digests)}, sort_keys=True)
        return Path(self.folder or "") / f"{hashlib.sha256(content.encode()).hexdigest()}.safetensors"

    def get(self, extractor: Extractor, digests: Sequence[str], names: Sequence[str]) -> SetFeatures | None:
        """The features of a set in the order of `digests`; None when they are not in the cache."""
        path = self.path(extractor, digests)
        if self.folder is None or not path.is_file():
            return None
        try:
            return reorder_by_digest(read_features(path), digests, names)
        except (ValueError, KeyError, OSError) as error:
            warnings.warn(
                f"the cached features cannot be used and are extracted again: {error}", stacklevel=2
            )
            return None

    def put(self, extractor: Extractor, content: SetFeatures) -> None:
        """Stores the features of a set."""
        if self.folder is None:
            return
        digests = [info.sha256 for info in content.infos]
        try:
            write_features(self.path(extractor, digests), content)
        except OSError as error:
            reason = error.strerror or error
            warnings.warn(f"features are not cached in {self.folder}: {reason}", stacklevel=2)
