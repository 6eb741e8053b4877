"""Cosines of embeddings: CLIP-I, DINO, CLIP-T of subject-driven generation (DreamBooth, arXiv 2208.12242,
section 4.1).

Rows are embeddings of images or texts, of any length: all functions normalise them.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from diffadapt.metrics.checks import Features, as_features, as_pair


def image_similarities(*, real: Features, generated: Features) -> Tensor:
    """Mean cosine of each generated image to all real ones, (M,): its share of CLIP-I or DINO.

    Args:
        real, generated: (N, D), (M, D).
    """
    real, generated = as_pair(real, generated, min_rows=1)
    return normalize(generated, dim=1) @ normalize(real, dim=1).mean(dim=0)  # (M, D) @ (D,)


def mean_similarity(*, real: Features, generated: Features) -> float:
    """Mean cosine over all pairs of a real and a generated image: CLIP-I or DINO."""
    return float(image_similarities(real=real, generated=generated).mean())


def paired_similarities(*, first: Features, second: Features) -> Tensor:
    """Cosine of corresponding rows, (N,), such as one seed before and after training.

    Args:
        first, second: (N, D) each.
    """
    first = as_features("first", first, min_rows=1)
    second = as_features("second", second, min_rows=1)
    if first.shape != second.shape:
        raise ValueError(f"rows must correspond, got {tuple(first.shape)} and {tuple(second.shape)}")
    return (normalize(first, dim=1) * normalize(second, dim=1)).sum(dim=1)


def text_similarities(*, images: Features, texts: Features) -> Tensor:
    """Cosine of each image to its own text, (N,): its share of CLIP-T.

    Args:
        images, texts: (N, D) each, in one order.
    """
    images = as_features("images", images, min_rows=1)
    texts = as_features("texts", texts, min_rows=1)
    if images.shape != texts.shape:
        raise ValueError(
            f"one text embedding per image is needed, got {tuple(images.shape)} and {tuple(texts.shape)}"
        )
    return paired_similarities(first=images, second=texts)


def ceiling_similarity(*, real: Features) -> float:
    """Mean cosine between different real images: CLIP-I or DINO of the subject itself.

        (|sum_i x_i|^2 - sum_i |x_i|^2) / (n (n - 1)),    x_i of length 1,

    which needs no matrix of all pairs.
    """
    rows = normalize(as_features("real", real), dim=1)
    n = len(rows)
    sum_of_all_cosines = rows.sum(dim=0).square().sum()  # each row with itself too
    return float((sum_of_all_cosines - rows.square().sum()) / (n * (n - 1)))
