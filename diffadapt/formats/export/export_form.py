"""The few factored forms other programs can read, and how every expression becomes one of them.

A form is a ``LowRank``, ``Tucker``, ``LowRankHadamard``, ``Kron`` or ``Dense`` in float64, multiplier folded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffadapt.algebra.class_table_expression import NewClassTable
from diffadapt.algebra.expression import Expression
from diffadapt.algebra.full_rank import (
    ColumnScaled,
    Dense,
    Kron,
    LowRankHadamard,
    RelativeChange,
    Replacement,
    ReshapedLowRank,
    Scaled,
    Sum,
)
from diffadapt.algebra.low_rank import FeatureSum, LowRank, Reparametrized, Tucker
from diffadapt.methods.mora import SquareBetween

Form = LowRank | Tucker | LowRankHadamard | Kron | Dense

# Singular values below this share of the largest are rounding: factors are float32.
RANK_TOLERANCE = 1e-7


def form_of(expression: Expression, factor: float, base_shape: torch.Size) -> Form:
    """``factor`` times an expression as a form with the same matrix."""
    if isinstance(expression, Scaled):
        return form_of(expression.inner, factor * expression.factor, base_shape)
    if isinstance(expression, Sum):
        first, second = (form_of(part, factor, base_shape) for part in (expression.first, expression.second))
        return added(first, second)
    wide = expression.with_tensors([tensor.detach().double() for tensor in expression.tensors()])
    if isinstance(wide, Reparametrized):
        wide = wide.as_low_rank()
    if isinstance(wide, LowRank | Tucker):
        return type(wide)(factor * wide.up, *wide.tensors()[1:])
    if isinstance(wide, FeatureSum):
        return LowRank(factor * wide.vector[:, None], wide.vector.new_ones(1, wide.fan_in))
    if isinstance(wide, LowRankHadamard):
        first, second = low_rank(wide.first), low_rank(wide.second)
        return LowRankHadamard(LowRank(factor * first.up, first.down), second)
    if isinstance(wide, Kron):
        right = wide.right if isinstance(wide.right, Dense) else low_rank(wide.right)
        return Kron(factor * wide.left, right)
    if isinstance(wide, ReshapedLowRank) and isinstance(wide.inner, LowRank):
        return _unfolded(wide.inner, wide.shape, factor)
    if isinstance(wide, SquareBetween) and not wide.rotated:
        return _repeated(wide, factor)
    matrix = factor * wide.matrix()
    if isinstance(wide, Dense | RelativeChange | ColumnScaled | Replacement | NewClassTable):
        return Dense(matrix)
    return _thinned(matrix)


def added(first: Form, second: Form) -> Form:
    """The sum: factored where both can be and it is smaller."""
    low = [low_rank(form) for form in (first, second)]
    if None not in low:
        up, down = torch.cat([f.up for f in low], 1), torch.cat([f.down for f in low], 0)
        if up.shape[1] < min(up.shape[0], down.shape[1]):
            return LowRank(up, down)
    return Dense(first.matrix() + second.matrix())


def rows_scaled(form: Form, rows: Tensor) -> Form:
    """The form with every row multiplied by an entry of ``rows (out,)``."""
    if isinstance(form, LowRank | Tucker):
        return type(form)(rows[:, None] * form.up, *form.tensors()[1:])
    if isinstance(form, LowRankHadamard):
        return LowRankHadamard(LowRank(rows[:, None] * form.first.up, form.first.down), form.second)
    if isinstance(form, Kron):
        return rows_scaled(low_rank(form), rows)
    return Dense(rows[:, None] * form.matrix())


def low_rank(form: Form) -> LowRank | None:
    """The exact product of two factors that equals the form, of the smallest rank its structure gives; None
    for a matrix without structure."""
    if isinstance(form, Dense):
        return None
    if isinstance(form, LowRank):
        return form
    if isinstance(form, Tucker):
        product = LowRank(form.up, torch.einsum("ab...,bi->ai...", form.core, form.down).flatten(1))
    elif isinstance(form, LowRankHadamard):
        (u1, d1), (u2, d2) = form.first.tensors(), form.second.tensors()
        up = (u1[:, :, None] * u2[:, None, :]).flatten(1)  # rows of the Khatri-Rao product
        product = LowRank(up, (d1[:, None, :] * d2[None, :, :]).flatten(0, 1))
    else:
        product = _kron_product(form)
    rank, (out, fan_in) = product.up.shape[1], (product.up.shape[0], product.down.shape[1])
    return product if rank <= min(out, fan_in) else full_rank(form.matrix())


def full_rank(matrix: Tensor) -> LowRank:
    """A matrix as a product with the identity on its shorter side."""
    out, fan_in = matrix.shape
    eye = torch.eye(min(out, fan_in), dtype=matrix.dtype, device=matrix.device)
    return LowRank(eye, matrix) if out <= fan_in else LowRank(matrix, eye)


def factor_weights(factors: LowRank, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`down (r, in, *kernel)` and `up (out, r, 1, ...)`: the weights of a layer like the one of that weight's
    `shape`, and of one of kernel size 1 behind it."""
    rank = factors.up.shape[1]
    ones = (1,) * (len(shape) - 2)
    return factors.down.reshape(rank, *shape[1:]), factors.up.reshape(shape[0], rank, *ones)


def nothing(out: int, fan_in: int) -> LowRank:
    """A change of rank 1 that changes nothing."""
    return LowRank(torch.zeros(out, 1, dtype=torch.float64), torch.zeros(1, fan_in, dtype=torch.float64))


def nearest(matrix: Tensor, rank: int) -> LowRank:
    """The product of two factors of a rank nearest to a matrix in the Frobenius norm: its truncated SVD."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = values[:rank].sqrt()
    return LowRank(left[:, :rank] * root, root[:, None] * right[:rank])


def _unfolded(inner: LowRank, shape: tuple[int, int], factor: float) -> Form:
    """A product (out * m, r) (r, n) read into (out, m * n): one of rank m * r, blocks on the diagonal."""
    parts, rest = divmod(inner.up.shape[0], shape[0])
    if rest or parts * inner.up.shape[1] >= min(shape):
        return _thinned(factor * inner.matrix().reshape(shape))
    up = factor * inner.up.reshape(shape[0], -1)  # (out, m * r)
    return LowRank(up, torch.block_diag(*[inner.down] * parts))


def _repeated(expression: SquareBetween, factor: float) -> Form:
    """MoRA of type 1: every row is one of the first r' rows."""
    side, matrix = expression.square.shape[0], factor * expression.matrix()
    if side >= min(matrix.shape):
        return Dense(matrix)
    eye = torch.eye(side, dtype=matrix.dtype, device=matrix.device)
    return LowRank(eye.repeat(-(-matrix.shape[0] // side), 1)[: matrix.shape[0]], matrix[:side])


def _kron_product(form: Kron) -> LowRank:
    right = form.right if isinstance(form.right, LowRank) else full_rank(form.right.matrix())
    rows, columns = form.left.shape
    eye = torch.eye(min(rows, columns), dtype=form.left.dtype, device=form.left.device)
    if rows <= columns:
        return LowRank(torch.kron(eye, right.up), torch.kron(form.left, right.down))
    return LowRank(torch.kron(form.left, right.up), torch.kron(eye, right.down))


def _thinned(matrix: Tensor) -> Form:
    """The factors of a matrix whose rank is so low that they are smaller than it; else the matrix."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = max(1, int((values > RANK_TOLERANCE * values[0]).sum()))
    if rank * sum(matrix.shape) >= matrix.numel():
        return Dense(matrix)
    root = values[:rank].sqrt()
    return LowRank(left[:, :rank] * root, root[:, None] * right[:rank])
