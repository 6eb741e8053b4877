"""What an adapter did to the weights: sizes, ranks, directions, and how near a dense fine-tune it came."""

from diffadapt.evaluation.adapter_analysis.formulas import (
    alignment,
    amplification_factor,
    compression_vectors,
    effective_rank,
    numerical_rank,
    relative_distance,
    subspace_similarity,
)
from diffadapt.evaluation.adapter_analysis.layers import (
    LayerFigures,
    analyse,
    configured_rank,
    summary,
)

__all__ = [
    "LayerFigures",
    "alignment",
    "amplification_factor",
    "analyse",
    "compression_vectors",
    "configured_rank",
    "effective_rank",
    "numerical_rank",
    "relative_distance",
    "subspace_similarity",
    "summary",
]
