"""A site: one weight of the model that an adapter may change, described by its shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

LayerKind = Literal["linear", "conv", "embedding", "norm"]

_CLASS_TABLES = (  # how modules that hold one name it
    "class_embedding",
    "class_embedder.embedding_table",
    "y_embedder.embedding_table",
    "label_emb",
)


@dataclass(frozen=True)
class Site:
    """One weight, seen as a matrix ``(out, fan_in)``.

    Attributes:
        name: the layer's module path, e.g. ``unet.mid_block.resnets.0.conv1``.
        kind: what the layer does with the weight.
        shape: the weight's own, e.g. ``(out, in)``, ``(out, in/groups, *kernel)`` or ``(channels,)``.
        groups: groups of a convolution, else 1.
        has_bias: whether the layer has a bias.
    """

    name: str
    kind: LayerKind
    shape: tuple[int, ...]
    groups: int = 1
    has_bias: bool = False

    @property
    def out(self) -> int:
        return self.shape[0]

    @property
    def fan_in(self) -> int:
        """Columns of the weight seen as a matrix: in/groups times the kernel's size."""
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
        return self.shape if self.kind == "norm" else (self.out,)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def is_class_table(name: str) -> bool:
    """Whether an embedding of that module name is a class table."""
    return name.endswith(_CLASS_TABLES)
