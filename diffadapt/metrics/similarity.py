"""Similarity figures of subject-driven generation, on unit vectors (DreamBooth, arXiv 2208.12242, 4.1)."""

from torch import Tensor


def mean_similarity(generated: Tensor, real: Tensor) -> float:
    """Mean cosine over all pairs: how much the generated pictures look like the subject (CLIP-I, DINO)."""
    return float((generated.double() @ real.double().T).mean())


def nearest_similarity(generated: Tensor, real: Tensor) -> float:
    """Mean cosine to the nearest training picture: near 1 means copying."""
    return float((generated.double() @ real.double().T).amax(dim=1).mean())


def paired_similarity(first: Tensor, second: Tensor) -> float:
    """Mean cosine of corresponding rows: picture and its text (CLIP-T), or one seed before and after."""
    return float((first.double() * second.double()).sum(dim=1).mean())
