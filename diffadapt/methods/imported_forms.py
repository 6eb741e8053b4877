"""The forms of changes in other tools' files, and the expression that each makes of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from diffadapt.algebra.expression import Expression
from diffadapt.algebra.full_rank import Dense, EntrywiseProduct, Kron, LowRankHadamard
from diffadapt.algebra.low_rank import LowRank, Tucker

Tensors = Mapping[str, Tensor]


def _tucker(up: Tensor, core: Tensor, down: Tensor) -> Tucker:
    # up (out, r_out), core (r_out, r_in, *kernel), down (r_in, in/groups); a side of 1 would be broadcast
    if core.shape[:2] != (up.shape[1], down.shape[0]):
        raise ValueError(f"a core of {tuple(core.shape)} between {tuple(up.shape)} and {tuple(down.shape)}")
    return Tucker(up, core, down)


def _low_rank_or_tucker(up: Tensor, core: Tensor | None, down: Tensor) -> LowRank | Tucker:
    return LowRank(up, down) if core is None else _tucker(up, core, down)


def _loha(tensors: Tensors) -> Expression:
    """`(up_1 down_1) o (up_2 down_2)`, either of which may have a Tucker core between its factors."""
    first = _low_rank_or_tucker(tensors["up_1"], tensors.get("core_1"), tensors["down_1"])
    second = _low_rank_or_tucker(tensors["up_2"], tensors.get("core_2"), tensors["down_2"])
    if "core_1" in tensors or "core_2" in tensors:
        return EntrywiseProduct(first, second)
    return LowRankHadamard(first, second)


def _lokr(tensors: Tensors) -> Kron:
    """`left (x) right`, each of them dense or in factors."""
    first = tensors["left"] if "left" in tensors else tensors["left_up"] @ tensors["left_down"]
    if "right" in tensors:
        return Kron(first, Dense(tensors["right"]))
    return Kron(first, _low_rank_or_tucker(tensors["up"], tensors.get("core"), tensors["down"]))


# form -> the change its tensors are; every form may also carry a bias and a magnitude
FORMS: dict[str, Callable[[Tensors], Expression | None]] = {
    "lora": lambda tensors: LowRank(tensors["up"], tensors["down"]),
    "tucker": lambda tensors: _tucker(tensors["up"], tensors["core"], tensors["down"]),
    "loha": _loha,
    "lokr": _lokr,
    "dense": lambda tensors: Dense(tensors["weight"]),
    "bias": lambda tensors: None,
}
