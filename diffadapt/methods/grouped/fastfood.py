"""Fastfood: a random projection of long vectors in O(n log n), with nothing to store.

    linear(x) = x H' diag[G] Pi H diag[B]

`H` is the orthonormal Walsh-Hadamard matrix of size `n = 2^ceil(log2(max(inputs, outputs)))`, `H'` its first
rows (zeros are appended to `x`), `G` normal, `Pi` a permutation, `B` random signs. There is no divisor after
it. The second versions (`_v2`) put a normal vector in the place of `B`, and the nonlinear ones return
`tanhshrink(linear(x)) = linear(x) - tanh(linear(x))`.

Source: SuperLoRA, arXiv 2403.11887, equation 3 and appendix A.10; Le et al. 2013.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from diffadapt.methods.random_init import named_generator

PROJECTIONS = ("none", "shuffle", "linear", "linear_v2", "nonlinear", "nonlinear_v2")
_RADIX_BITS = 4  # a product with the 16 x 16 matrix does four butterfly stages at once: measured fastest


def padded_size(inputs: int, outputs: int) -> int:
    """The size of the transforms: the smallest power of two that is not below either number."""
    return 1 << (max(inputs, outputs) - 1).bit_length()


def draw_projection(inputs: int, outputs: int, projection: str, seed: int) -> dict[str, Tensor]:
    """Draws the random numbers of a projection: a function of seed and sizes, the same on every machine.

    Args:
        inputs: length of the vectors to project.
        outputs: length of the projected vectors.
        projection: one of `PROJECTIONS` but `none`.
        seed: the adapter's seed.

    Returns:
        `permutation` (int32) and, unless the projection is `shuffle`, the float64 tensors `gauss (n,)` and
        `last (outputs,)`.
    """

    def generator(word: str) -> torch.Generator:
        return named_generator(seed, "fastfood", str(inputs), str(outputs), word)

    size = outputs if projection == "shuffle" else padded_size(inputs, outputs)
    permutation = torch.randperm(size, device="cpu", generator=generator("permutation"))
    tensors = {"permutation": permutation.to(torch.int32)}
    if projection == "shuffle":
        return tensors
    tensors["gauss"] = torch.randn(size, dtype=torch.float64, device="cpu", generator=generator("gauss"))
    if projection.endswith("_v2"):
        last = torch.randn(outputs, dtype=torch.float64, device="cpu", generator=generator("last"))
    else:
        uniform = torch.rand(outputs, dtype=torch.float64, device="cpu", generator=generator("signs"))
        last = torch.where(uniform < 0.5, -1.0, 1.0).double()
    tensors["last"] = last
    return tensors


def project(x: Tensor, tensors: Mapping[str, Tensor], projection: str) -> Tensor:
    """Projects a vector.

    Args:
        x: the vector `(inputs,)`.
        tensors: the random numbers of `draw_projection`.
        projection: the one that they were drawn for.

    Returns:
        The projected vector `(outputs,)`.
    """
    permutation = tensors["permutation"]
    if projection == "shuffle":
        return x.index_select(0, permutation)
    gauss = tensors["gauss"]  # G (n,)
    last = tensors["last"]  # B (outputs,), or a normal vector in the second versions
    size = gauss.numel()
    padded = F.pad(x, (0, size - x.numel()))  # (n,)
    mixed = gauss * walsh_hadamard(padded)  # x H' diag[G]
    mixed = walsh_hadamard(mixed.index_select(0, permutation))  # ... Pi H
    linear = mixed[: last.numel()] * last / size  # ... diag[B]; n is both transforms' divisor sqrt(n)
    return linear - torch.tanh(linear) if projection.startswith("nonlinear") else linear


def walsh_hadamard(x: Tensor) -> Tensor:
    """The product of `x (n,)` and the Walsh-Hadamard matrix of signs, `n` a power of two, in O(n log n).

    Divide by sqrt(n) for the orthonormal transform.
    """
    remaining_bits = x.numel().bit_length() - 1
    while remaining_bits > 0:
        bits = min(_RADIX_BITS, remaining_bits)
        # Transforms the leading axis and moves it behind the others, so that the order after all stages is
        # the one at the start: (2^bits, n / 2^bits) -> (n / 2^bits, 2^bits).
        leading_axis = x.reshape(1 << bits, -1)
        x = (leading_axis.T @ _sign_matrix(bits, x)).reshape(-1)
        remaining_bits -= bits
    return x


def _sign_matrix(bits: int, like: Tensor) -> Tensor:
    """The Walsh-Hadamard matrix of size `2^bits` without its divisor, in the dtype of `like`."""
    pair = like.new_tensor([[1.0, 1.0], [1.0, -1.0]])
    matrix = like.new_ones(1, 1)
    for _ in range(bits):
        matrix = torch.kron(pair, matrix)
    return matrix
