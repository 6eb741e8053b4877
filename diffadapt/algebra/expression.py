"""The algebra of adapters: what a method changes in one layer, as an expression instead of a tensor.

    W' = scale * (W + multiplier * delta)        b' = bias_scale * (b + bias)

``W`` is the weight seen as a matrix ``(out, fan_in)``. From the expression ``delta`` follow, once for all
methods, the fast forward (``apply``), the lean backward (``vjp``) and the exact merge (``matrix``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.algebra.layer_maps import ChainStep, LayerMap


class Expression:
    """A change of the weight matrix. Fields that are tensors or expressions are its factors, in order.

    ``saves_step_weights``: whether backward keeps the weights of ``steps``: views of the factors, or small.
    """

    saves_step_weights = False
    backward_needs_factors = True  # whether ``steps_backward`` reads the factors, not the gradients alone

    def matrix(self) -> Tensor:
        """The exact change ``(out, fan_in)`` in the factors' precision."""
        raise TypeError(f"{type(self).__name__} does not define matrix()")

    def base_weight(self, weight: Tensor) -> Tensor:
        """What the change is added to: the weight, but for tables that grow."""
        return weight

    def added_to(self, weight: Tensor) -> Tensor:
        """``weight (out, fan_in)`` plus the change, in as few passes over it as there are."""
        return weight + self.matrix()

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``tensors()`` given the gradient ``(out, fan_in)`` of ``matrix()``."""
        raise TypeError(f"{type(self).__name__} does not define vjp()")

    def is_thin(self, layer: LayerMap, shape: Sequence[int]) -> bool:
        """Whether the change, as a layer's weight of that ``shape``, is a chain of maps cheaper than it."""
        return False

    def steps(self, layer: LayerMap, shape: Sequence[int]) -> Sequence[ChainStep]:
        """That chain: at least two maps, the last thin on its input."""
        raise TypeError(f"{type(self).__name__} does not define steps()")

    def steps_backward(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Gradients of ``tensors()`` given those of the weights of ``steps``."""
        raise TypeError(f"{type(self).__name__} does not define steps_backward()")

    def for_dtype(self, dtype: torch.dtype) -> Expression:
        """The same change, with steps whose values stay in the range of activations in that precision."""
        return self

    def apply(self, layer: LayerMap, x: Tensor, shape: Sequence[int]) -> Tensor | None:
        """``layer(x)`` with the change alone as its weight, through its chain; None where it has none."""
        if not self.is_thin(layer, shape):
            return None
        for step in self.steps(layer, shape):
            x = step.map.apply(x, step.to(x.dtype).weight)
        return x

    def tensors(self) -> tuple[Tensor, ...]:
        """Every factor, depth first."""
        found: list[Tensor] = []
        for name in self.__match_args__:  # the dataclass' fields
            value = getattr(self, name)
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, Expression):
                found.extend(value.tensors())
        return tuple(found)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Expression:
        """The same expression over other factors, given in the order of ``tensors()``."""
        rest, values = list(tensors), []
        for name in self.__match_args__:  # the dataclass' fields
            value = getattr(self, name)
            if isinstance(value, Tensor):
                value = rest.pop(0)
            elif isinstance(value, Expression):
                count = len(value.tensors())
                value, rest = value.with_tensors(rest[:count]), rest[count:]
            values.append(value)
        return type(self)(*values)


@dataclass(frozen=True)
class Update:
    """What one method does to one layer. Row vectors are ``(out,)``; all in the adapter's precision.

    ``recompute``: make the unscaled product again in backward, where ``scale`` needs it; do not keep it.
    """

    delta: Expression | None = None
    multiplier: float = 1.0
    scale: Tensor | None = None
    bias: Tensor | None = None
    bias_scale: Tensor | None = None
    recompute: bool = False

    def weight(self, base: Tensor) -> Tensor:
        """The exact ``W'`` for a base weight of any shape; it has the shape of ``base_weight``."""
        weight = self.base_weight(base)
        if self.delta is not None:
            weight = weight + self.multiplier * self.delta.matrix().reshape(weight.shape)
        if self.scale is not None:
            weight = self.scale.reshape(-1, *(1,) * (base.dim() - 1)) * weight
        return weight

    def base_weight(self, base: Tensor) -> Tensor:
        """The weight without the change: the base, with the new rows of a table as they start."""
        return base if self.delta is None else self.delta.base_weight(base)

    def changes_bias(self) -> bool:
        return self.bias is not None or self.bias_scale is not None

    def bias_vector(self, base: Tensor) -> Tensor:
        """The exact ``b'``; a layer without a bias passes zeros."""
        vector = base if self.bias is None else base + self.bias
        return vector if self.bias_scale is None else self.bias_scale * vector
