"""CLIPScore of images and their texts (arXiv 2104.08718), as torchmetrics reports it: 100 x the cosine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from diffadapt.metrics.features import ClipFeatures, load_clip
from diffadapt.metrics.similarity import text_similarities


def clip_score(
    *, images: Tensor | Iterable[Tensor], texts: Sequence[str], model: ClipFeatures | str
) -> float:
    """100 x the mean cosine between each image and its text, not below 0.

    Args:
        images: (N, 3, H, W), or batches of them: uint8, or floating point in [0, 1].
        texts: N of them, in the order of the images.
        model: what `load_clip` gives, or the name or folder it takes.

    Raises:
        ValueError: there is another number of texts than images, or pixels are out of range.
    """
    extractor = load_clip(model) if isinstance(model, str) else model
    batches = [images] if isinstance(images, Tensor) else images
    features = extractor.images(_in_unit_range(batch) for batch in batches)  # (N, D)
    if len(features) != len(texts):
        raise ValueError(f"{len(features)} images, but {len(texts)} texts: one text per image is needed")
    cosines = text_similarities(images=features, texts=extractor.texts(texts))  # (N,)
    return max(0.0, 100 * float(cosines.mean()))


def _in_unit_range(batch: Tensor) -> Tensor:
    if batch.dtype == torch.uint8:
        return batch.float() / 255
    low = float(batch.min())
    high = float(batch.max())
    if not 0 <= low <= high <= 1:
        raise ValueError(f"floating-point images hold values in [0, 1], got {low:.3g} to {high:.3g}")
    return batch
