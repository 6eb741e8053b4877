"""The digit classifier shipped with the package, for bases that draw digits."""

from __future__ import annotations

from torch import Tensor

from diffadapt.common.safetensors_file import hash_tensors
from diffadapt.evaluation.features.extractors.base import Extractor, frozen
from diffadapt.metrics.digit_classifier import NAME, load_digit_classifier


def digits(*, preset: str | None, device: str) -> Extractor:
    """Layers "pool" and "logits"; resize `clean` unless told otherwise."""
    classifier = frozen(load_digit_classifier(), device)

    def network(pixels: Tensor) -> dict[str, Tensor]:
        return classifier((pixels / 255).to(device))

    sha256, layers = hash_tensors(classifier.state_dict()), ("pool", "logits")
    return Extractor(NAME, sha256, classifier.side, preset or "clean", layers, "pool", network, "logits")
