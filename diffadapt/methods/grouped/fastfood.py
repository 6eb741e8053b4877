"""Fastfood: a random projection of long vectors in O(n log n), with nothing to store.

    linear(x) = x H' diag[G] Pi H diag[B]

``H`` is the orthonormal Walsh-Hadamard matrix of size ``n = 2^ceil(log2(max(inputs, outputs)))``, ``H'`` its
first rows (zeros are appended to ``x``), ``G`` normal, ``Pi`` a permutation, ``B`` random signs. There is no
divisor after it. Source: SuperLoRA, arXiv 2403.11887, equation 3 and appendix A.10; Le et al. 2013.
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
    """The size of the transforms: the smallest power of two that holds both ends."""
    return 1 << (max(inputs, outputs) - 1).bit_length()


def draw_projection(inputs: int, outputs: int, projection: str, seed: int) -> dict[str, Tensor]:
    """The random numbers of a projection, a function of the seed and the two sizes on every machine.

    Returns: ``permutation`` (int32), and but for ``shuffle`` the float64 ``gauss (n,)``, ``last (outputs,)``.
    """
    size = outputs if projection == "shuffle" else padded_size(inputs, outputs)

    def generator(name: str) -> torch.Generator:
        return named_generator(seed, "fastfood", str(inputs), str(outputs), name)

    drawn = {
        "permutation": torch.randperm(size, device="cpu", generator=generator("permutation")).to(torch.int32)
    }
    if projection == "shuffle":
        return drawn
    drawn["gauss"] = torch.randn(size, dtype=torch.float64, device="cpu", generator=generator("gauss"))
    last = torch.rand(outputs, dtype=torch.float64, device="cpu", generator=generator("signs"))
    drawn["last"] = torch.where(last < 0.5, -1.0, 1.0).double()
    if projection.endswith("_v2"):
        drawn["last"] = torch.randn(outputs, dtype=torch.float64, device="cpu", generator=generator("last"))
    return drawn


def project(x: Tensor, drawn: Mapping[str, Tensor], projection: str) -> Tensor:
    """The projection of ``x (inputs,)`` to ``(outputs,)`` with the numbers of ``draw_projection``."""
    if projection == "shuffle":
        return x.index_select(0, drawn["permutation"])
    # gauss: G, permutation: Pi, last: B, or G' in the second versions
    size, last = drawn["gauss"].numel(), drawn["last"]
    mixed = drawn["gauss"] * walsh_hadamard(F.pad(x, (0, size - x.numel())))
    mixed = walsh_hadamard(mixed.index_select(0, drawn["permutation"]))
    linear = mixed[: last.numel()] * last / size  # both transforms' 1 / sqrt(n)
    return linear - torch.tanh(linear) if projection.startswith("nonlinear") else linear


def walsh_hadamard(x: Tensor) -> Tensor:
    """``x (n,)`` times the Walsh-Hadamard matrix of signs, ``n`` a power of two, in O(n log n).

    Divide by sqrt(n) for the orthonormal transform.
    """
    bits = x.numel().bit_length() - 1
    while bits > 0:
        step = min(_RADIX_BITS, bits)
        # transforms the leading axis and moves it behind the others: after all steps the order is the old one
        x = (x.reshape(1 << step, -1).T @ _signs(step, x)).reshape(-1)
        bits -= step
    return x


def _signs(bits: int, like: Tensor) -> Tensor:
    """The Walsh-Hadamard matrix of size ``2^bits``, without its divisor."""
    pair = like.new_tensor([[1.0, 1.0], [1.0, -1.0]])
    matrix = like.new_ones(1, 1)
    for _ in range(bits):
        matrix = torch.kron(pair, matrix)
    return matrix
