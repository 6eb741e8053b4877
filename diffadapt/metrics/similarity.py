"""Cosines of embeddings: CLIP-I, DINO, CLIP-T of subject-driven generation (DreamBooth, arXiv 2208.12242,
4.1).

Rows are embeddings of images or texts; functions on unit vectors say so, the others normalise.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from diffadapt.metrics.checks import Features, as_features, as_pair


def mean_similarity(generated: Tensor, real: Tensor) -> float:
    """Mean cosine over all pairs of unit vectors: how much the generated pictures look like the subject."""
    return float((generated.double() @ real.double().T).mean())


def nearest_similarity(generated: Tensor, real: Tensor) -> float:
    """Mean cosine to the nearest training picture, of unit vectors: near 1 means copying."""
    return float((generated.double() @ real.double().T).amax(dim=1).mean())


def paired_similarity(first: Tensor, second: Tensor) -> float:
    """Mean cosine of corresponding unit vectors: picture and text (CLIP-T), or one seed before and after."""
    return float((first.double() * second.double()).sum(dim=1).mean())


def image_similarities(*, real: Features, generated: Features) -> Tensor:
    """Of each generated image, the mean cosine to all real ones (M,): its share of CLIP-I or DINO."""
    real, generated = as_pair(real, generated, least=1)
    return normalize(generated, dim=1) @ normalize(real, dim=1).mean(dim=0)


def text_similarities(*, images: Features, texts: Features) -> Tensor:
    """Of each image, the cosine to its own text (N,): its share of CLIP-T."""
    images, texts = as_features("images", images, least=1), as_features("texts", texts, least=1)
    if images.shape != texts.shape:
        raise ValueError(
            f"one text embedding per image is needed, got {tuple(images.shape)} and {tuple(texts.shape)}"
        )
    return (normalize(images, dim=1) * normalize(texts, dim=1)).sum(dim=1)


def ceiling_similarity(*, real: Features) -> float:
    """Mean cosine between different real images: CLIP-I or DINO of the subject itself."""
    rows = normalize(as_features("real", real), dim=1)
    n = len(rows)
    of_all_pairs = rows.sum(dim=0).square().sum()  # without the matrix of pairs
    return float((of_all_pairs - rows.square().sum()) / (n * (n - 1)))
