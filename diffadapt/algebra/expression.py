"""The algebra of adapters: what a method changes in one layer, as an expression instead of a tensor.

    W' = scale * (W + multiplier * delta)        b' = bias_scale * (b + bias)

`W` is the weight seen as a matrix `(out, fan_in)`. From the expression `delta` follow, once for all methods,
the fast forward (`steps`), the lean backward (`steps_backward`, `vjp`) and the exact merge (`matrix`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from diffadapt.algebra.layer_maps import ChainStep, LayerMap, cast_steps

if TYPE_CHECKING:
    from diffadapt.algebra.low_rank import LowRank


class Expression:
    """A change `delta` of a weight, seen as a matrix `(out, fan_in)`.

    A subclass is a frozen dataclass. Those of its fields that are tensors or expressions are its factors; all
    others are constants. It defines `matrix`, `vjp` and `export_form`, and says `depends_on_base`. One that
    can be applied without building its matrix defines `is_thin`, `steps` and `steps_backward` too.

    The contract:

    - Order: `tensors`, `with_tensors` and the gradients that `vjp` and `steps_backward` return follow the
      fields, depth first. A factor that is never trained (a base weight, a frozen start) has the gradient
      None.
    - Precision: `matrix` and `vjp` compute in the precision of the factors. Callers cast the weights of
      `steps` to the precision of the activations, and the gradients by them back to that of the factors.
    - Chain: `steps` holds at least two maps, of which the first acts on `x`. Coefficients are multiplied into
      the input of the last one, which should therefore be thin: of few channels.
    - Backward: what is kept from forward follows from the two flags below; all else is computed again.
    - In place: no method changes a factor, an argument or a gradient. Results may be views of them, so
      callers change no result either.

    Class attributes:
        saves_step_weights: whether backward keeps the weights of `steps` instead of computing them again:
            they are views of the factors, or small.
        backward_needs_factors: whether `steps_backward` reads the factors, not the gradients alone.
        is_dense: whether it is a matrix without structure.
        depends_on_base: whether `delta` would be another one on another base. True unless a class says
            otherwise, which is always safe: files of such changes are resized and combined on their base.
    """

    saves_step_weights = False
    backward_needs_factors = True
    is_dense = False
    depends_on_base = True

    def matrix(self) -> Tensor:
        """The exact change `delta (out, fan_in)`."""
        raise TypeError(f"{type(self).__name__} does not define matrix()")

    def base_weight(self, weight: Tensor) -> Tensor:
        """What the change is added to: the weight, except for class tables that gain rows."""
        return weight

    def added_to(self, weight: Tensor) -> Tensor:
        """`weight + delta` for a matrix `weight (out, fan_in)`, in as few passes over it as possible."""
        return weight + self.matrix()

    def vjp(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The vector-Jacobian product of `matrix`.

        Args:
            grad: the gradient of the loss by `matrix()`, `(out, fan_in)`.

        Returns:
            The gradients by `tensors()`.
        """
        raise TypeError(f"{type(self).__name__} does not define vjp()")

    def export_form(self, factor: float = 1.0) -> ExportForm:
        """`factor * delta` in a form that the files of other programs hold, with exactly the same matrix.

        `low_rank_or_dense(factor * self.matrix())` of `full_rank.py` is right for every expression. One whose
        structure is known gives its own factors, which is faster and makes smaller files.
        """
        raise TypeError(f"{type(self).__name__} does not define export_form()")

    def thin_factors(self) -> LowRank | None:
        """`delta` as `up @ down`, where the expression is made as such a product; else None."""
        return None

    def is_thin(self, layer: LayerMap, shape: Sequence[int]) -> bool:
        """Whether applying the change through `steps` is cheaper than through its matrix.

        Args:
            layer: the map of the layer whose weight is changed.
            shape: of that weight, `(out, in / groups, *kernel)`.
        """
        return False

    def steps(self, layer: LayerMap, shape: Sequence[int]) -> Sequence[ChainStep]:
        """The chain of maps that applies the change, the first map first; arguments as of `is_thin`."""
        raise TypeError(f"{type(self).__name__} does not define steps()")

    def steps_backward(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradients by `tensors()`, given those by the weights of `steps` (None for untrained steps)."""
        raise TypeError(f"{type(self).__name__} does not define steps_backward()")

    def for_float16(self) -> Expression:
        """The same change, with steps whose values stay in the range of float16 activations."""
        return self

    def apply(self, layer: LayerMap, x: Tensor, shape: Sequence[int]) -> Tensor | None:
        """The output of the layer for `x` with `delta` alone as its weight; None where it is not thin.

        Every step is differentiated by autograd, which keeps more than `autograd.chain_product` does.
        """
        if not self.is_thin(layer, shape):
            return None
        for step in cast_steps(self.steps(layer, shape), x.dtype):
            x = step.map.apply(x, step.weight)
        return x

    def tensors(self) -> tuple[Tensor, ...]:
        """Every factor, depth first."""
        tensors: list[Tensor] = []
        for name in self.__match_args__:  # the fields of the dataclass
            value = getattr(self, name)
            if isinstance(value, Tensor):
                tensors.append(value)
            elif isinstance(value, Expression):
                tensors.extend(value.tensors())
        return tuple(tensors)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Expression:
        """The same expression over other factors, given in the order of `tensors()`."""
        remaining = list(tensors)
        values = []
        for name in self.__match_args__:  # the fields of the dataclass
            value = getattr(self, name)
            if isinstance(value, Tensor):
                value = remaining.pop(0)
            elif isinstance(value, Expression):
                count = len(value.tensors())
                value = value.with_tensors(remaining[:count])
                del remaining[:count]
            values.append(value)
        return type(self)(*values)

    def in_float64(self) -> Expression:
        """The same expression over detached factors in float64."""
        return self.with_tensors([tensor.detach().double() for tensor in self.tensors()])


class ExportForm(Expression):
    """An expression that files of other programs hold.

    These are `LowRank`, `Tucker`, `LowRankHadamard`, `Kron` and `Dense`; what `export_form` returns.
    """

    def rows_scaled(self, rows: Tensor) -> ExportForm:
        """`diag(rows) delta`, with `rows (out,)`."""
        raise TypeError(f"{type(self).__name__} does not define rows_scaled()")

    def as_product(self) -> LowRank | None:
        """`delta` as `up @ down` of the smallest rank that the structure gives; None for a dense matrix."""
        raise TypeError(f"{type(self).__name__} does not define as_product()")


@dataclass(frozen=True)
class Update:
    """What one method does to one layer: the equations at the top of this module.

    Row vectors are `(out,)`; all tensors are in the adapter's precision. None stands for no change.

    Attributes:
        recompute: whether backward computes the product before `scale`, which the gradient by `scale` needs,
            again instead of keeping it.
    """

    delta: Expression | None = None
    multiplier: float = 1.0
    scale: Tensor | None = None
    bias: Tensor | None = None
    bias_scale: Tensor | None = None
    recompute: bool = False

    def weight(self, base: Tensor) -> Tensor:
        """The exact `W'` for a base weight of any shape; it has the shape of `base_weight(base)`."""
        weight = self.base_weight(base)
        if self.delta is not None:
            weight = weight + self.multiplier * self.delta.matrix().reshape(weight.shape)
        if self.scale is not None:
            weight = self.scale.reshape(-1, *(1,) * (base.dim() - 1)) * weight
        return weight

    def base_weight(self, base: Tensor) -> Tensor:
        """What the change is added to: the base, with the initial values of rows that a class table gains."""
        return base if self.delta is None else self.delta.base_weight(base)

    def changes_bias(self) -> bool:
        return self.bias is not None or self.bias_scale is not None

    def bias_vector(self, base: Tensor) -> Tensor:
        """The exact `b' (out,)`; a layer without a bias passes zeros."""
        vector = base if self.bias is None else base + self.bias
        return vector if self.bias_scale is None else self.bias_scale * vector
