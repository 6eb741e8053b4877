"""The embedded classifier of digits as an extractor: for demonstrations and tests on pictures of digits."""

from __future__ import annotations

from torch import Tensor

from diffadapt.evaluation.extractors.base import Extractor, frozen
from diffadapt.evaluation.weights import sha256_of_tensors
from diffadapt.metrics.digit_classifier import NAME, load_digit_classifier


def digits(*, preset: str | None, device: str) -> Extractor:
    """Layers "pool" (64 features, after the last ReLU) and "logits" (10)."""
    classifier = frozen(load_digit_classifier(), device)

    def network(pixels: Tensor) -> dict[str, Tensor]:
        return classifier(pixels.to(device) / 255)

    sha256, layers = sha256_of_tensors(classifier.state_dict()), ("pool", "logits")
    return Extractor(NAME, sha256, classifier.side, preset or "clean", layers, "pool", network, "logits")
