"""The digit classifier shipped with the package, for bases that generate digits."""

from __future__ import annotations

from torch import Tensor

from diffadapt.common.safetensors_file import hash_tensors
from diffadapt.evaluation.features.extractors.base import Extractor, frozen
from diffadapt.metrics.digit_classifier import NAME, load_digit_classifier


def digits(*, preset: str | None, device: str) -> Extractor:
    """Layers "pool" and "logits"; default resize `clean`."""
    classifier = frozen(load_digit_classifier(), device)

    def network(pixels: Tensor) -> dict[str, Tensor]:
        return classifier((pixels / 255).to(device))

    return Extractor(
        name=NAME,
        sha256=hash_tensors(classifier.state_dict()),
        side=classifier.side,
        preset=preset or "clean",
        layers=("pool", "logits"),
        feature_layer="pool",
        network=network,
        logit_layer="logits",
    )
