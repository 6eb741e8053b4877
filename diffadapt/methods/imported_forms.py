"""The forms of changes in other tools' files, and the expression each makes of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from diffadapt.algebra.expression import Expression
from diffadapt.algebra.full_rank import Dense, EntrywiseProduct, Kron, LowRankHadamard
from diffadapt.algebra.low_rank import LowRank, Tucker

Tensors = Mapping[str, Tensor]


def _tucker(up: Tensor, core: Tensor, down: Tensor) -> Tucker:
    if core.shape[:2] != (up.shape[1], down.shape[0]):  # a size of one would be repeated unnoticed
        raise ValueError(f"a core of {tuple(core.shape)} between {tuple(up.shape)} and {tuple(down.shape)}")
    return Tucker(up, core, down)


def _half(tensors: Tensors, number: int) -> LowRank | Tucker:
    up, down = tensors[f"up_{number}"], tensors[f"down_{number}"]
    core = tensors.get(f"core_{number}")
    return LowRank(up, down) if core is None else _tucker(up, core, down)


def _entrywise(first: LowRank | Tucker, second: LowRank | Tucker) -> Expression:
    plain = isinstance(first, LowRank) and isinstance(second, LowRank)
    return LowRankHadamard(first, second) if plain else EntrywiseProduct(first, second)


def _kron(tensors: Tensors) -> Kron:
    left = tensors["left"] if "left" in tensors else tensors["left_up"] @ tensors["left_down"]
    if "right" in tensors:
        return Kron(left, Dense(tensors["right"]))
    core = tensors.get("core")
    up, down = tensors["up"], tensors["down"]
    return Kron(left, LowRank(up, down) if core is None else _tucker(up, core, down))


# form -> the change its tensors are; every form may also carry a bias and a magnitude
FORMS: dict[str, Callable[[Tensors], Expression | None]] = {
    "lora": lambda tensors: LowRank(tensors["up"], tensors["down"]),
    "tucker": lambda tensors: _tucker(tensors["up"], tensors["core"], tensors["down"]),
    "loha": lambda tensors: _entrywise(_half(tensors, 1), _half(tensors, 2)),
    "lokr": _kron,
    "dense": lambda tensors: Dense(tensors["weight"]),
    "bias": lambda tensors: None,
}
