"""A site: one weight of the model that an adapter may change, described by its shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

LayerKind = Literal["linear", "conv", "embedding", "norm"]

# the module names that models give to their table of class embeddings
_CLASS_TABLES = (
    "class_embedding",
    "class_embedder.embedding_table",
    "y_embedder.embedding_table",
    "label_emb",
)


@dataclass(frozen=True)
class Site:
    """One weight, seen as a matrix `(out, fan_in)`.

    Attributes:
        name: the layer's module path, e.g. `unet.mid_block.resnets.0.conv1`.
        kind: the kind of layer that holds the weight.
        shape: the weight's own shape, e.g. `(out, in)`, `(out, in/groups, *kernel)` or `(channels,)`.
        groups: the groups of a convolution, else 1.
        has_bias: whether the layer has a bias.
    """

    name: str
    kind: LayerKind
    shape: tuple[int, ...]
    groups: int = 1
    has_bias: bool = False

    @property
    def out(self) -> int:
        """Output features or channels: the rows of the matrix."""
        return self.shape[0]

    @property
    def fan_in(self) -> int:
        """Columns of the matrix: in/groups times the size of the kernel."""
        return math.prod(self.shape[1:])

    @property
    def channels_in(self) -> int:
        """Input features or channels per group."""
        return self.shape[1] if len(self.shape) > 1 else 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size of a convolution; empty for other layers."""
        return self.shape[2:] if self.kind == "conv" else ()

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """The shape of the bias that the layer has or could have."""
        return self.shape if self.kind == "norm" else (self.out,)

    @property
    def numel(self) -> int:
        """Number of entries of the weight."""
        return math.prod(self.shape)


def is_class_table(name: str) -> bool:
    """Whether an embedding of that module name is a table of class embeddings."""
    return name.endswith(_CLASS_TABLES)
