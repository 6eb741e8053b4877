"""Features of references, kept on disk under a name made of everything they depend on.

One changed byte in one image, other weights, another preset, layer, precision or version: another name.
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
    by_digest,
    read_features,
    write_features,
)

FOLDER = "DIFFADAPT_CACHE"  # environment variable


def default_folder() -> Path:
    """$DIFFADAPT_CACHE, or diffadapt/features in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(FOLDER) or Path(home) / "diffadapt" / "features")


def identity_of(extractor: Extractor) -> dict[str, object]:
    """Everything of an extractor that its features depend on."""
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
    """Features by content. A folder that cannot be written to or a torn file costs a warning, not the run."""

    def __init__(self, folder: Path | None):
        """folder: None keeps nothing."""
        self.folder = folder

    def path(self, extractor: Extractor, digests: Sequence[str]) -> Path:
        content = json.dumps({**identity_of(extractor), "images": sorted(digests)}, sort_keys=True)
        return Path(self.folder or "") / f"{hashlib.sha256(content.encode()).hexdigest()}.safetensors"

    def get(self, extractor: Extractor, digests: Sequence[str], names: Sequence[str]) -> SetFeatures | None:
        """Features in the order of `digests`; None when they are not kept."""
        path = self.path(extractor, digests)
        if self.folder is None or not path.is_file():
            return None
        try:
            return by_digest(read_features(path), digests, names)
        except (ValueError, KeyError, OSError) as error:
            warnings.warn(f"the cached features cannot be used and are made again: {error}", stacklevel=2)
            return None

    def put(self, extractor: Extractor, content: SetFeatures) -> None:
        if self.folder is None:
            return
        try:
            write_features(self.path(extractor, [facts.sha256 for facts in content.facts]), content)
        except OSError as error:
            warnings.warn(
                f"features are not cached in {self.folder}: {error.strerror or error}", stacklevel=2
            )
