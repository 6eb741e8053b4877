"""Analysis of adapters: sizes, ranks and directions of weight changes, and distances to a dense fine-tune."""

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
    LayerMeasures,
    analyse,
    configured_rank,
    summary,
)

__all__ = [
    "LayerMeasures",
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
