"""What a method is: a frozen record of options, and three functions of one site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from diffadapt.site import Kind, Site
from diffadapt.update import Update

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Method:
    """A way to change weights. Its fields are its options and its JSON config.

    Class attributes:
        name: the registered name.
        kinds: the kinds of layers it can change.
        learning_rate: recommended rate for AdamW, used when none is given.
    """

    name: ClassVar[str]
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear", "conv"})
    learning_rate: ClassVar[float]

    def __post_init__(self) -> None:
        for field in fields(self):
            value, wanted = getattr(self, field.name), str(field.type).split(" | ")
            if "float" in wanted and type(value) is int:
                continue
            if type(value).__name__ not in (*wanted, "tuple") and not (value is None and "None" in wanted):
                raise ValueError(f"{self.name}: {field.name} must be {field.type}, got {value!r}")

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods this one combines; itself alone unless made with ``+``."""
        return (self,)

    @property
    def config(self) -> dict:
        """The options that differ from their defaults, as JSON-ready values."""
        defaults = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        return {key: value for key, value in asdict(self).items() if defaults.get(key, MISSING) != value}

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.config.items())
        return f"{self.name}({options})" if options else self.name

    def trained(self, site: Site) -> Shapes:
        """Names and shapes of a site's trained tensors. Raises ValueError for a site it cannot change."""
        raise TypeError(f"{type(self).__name__} does not define trained()")

    def start(
        self, site: Site, tensors: Mapping[str, Tensor], base: Tensor, generator: torch.Generator
    ) -> None:
        """Fill the tensors, which arrive as zeros, so that the layer's output does not change."""

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        """What the tensors do to the layer whose frozen weight is ``base``."""
        raise TypeError(f"{type(self).__name__} does not define update()")


@dataclass(frozen=True)
class RankedMethod(Method):
    """A method with a rank and a multiplier: ``alpha`` (multiplier alpha/rank) or the constant ``scale``."""

    rank: int = 4  # size of the factors
    alpha: float | None = None  # multiplier = alpha / rank; default alpha = rank
    scale: float | None = None  # multiplier itself, as papers state it
    dropout: float = 0.0  # share of the branch's inputs set to zero while training, in [0, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank("rank", self.rank)
        if self.alpha is not None and self.scale is not None:
            raise ValueError(f"{self.name}: give alpha={self.alpha} or scale={self.scale}, not both")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{self.name}: dropout must be in [0, 1), got {self.dropout}")

    @property
    def multiplier(self) -> float:
        """What the branch is multiplied with."""
        if self.scale is not None:
            return float(self.scale)
        return (self.rank if self.alpha is None else self.alpha) / self.alpha_divisor()

    def alpha_divisor(self) -> float:
        return self.rank


def check_rank(option: str, value: int) -> None:
    """Raises ValueError unless ``value`` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{option} must be a whole number >= 1, got {value!r}")


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{option} must be one of {', '.join(choices)}, got {value!r}")


def draw_normal(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill with N(0, std^2), drawn in float64 on the CPU so that every machine draws the same."""
    tensor.copy_(std * torch.randn(tensor.shape, dtype=torch.float64, generator=generator))


def draw_uniform(tensor: Tensor, bound: float, generator: torch.Generator) -> None:
    """Fill with U(-bound, bound), drawn in float64 on the CPU."""
    tensor.copy_(bound * (2 * torch.rand(tensor.shape, dtype=torch.float64, generator=generator) - 1))


def draw_orthonormal(tensor: Tensor, generator: torch.Generator) -> None:
    """Fill a matrix with a random orthonormal frame: columns, or rows where it is wider than tall."""
    rows, columns = tensor.shape
    gaussian = torch.randn(max(rows, columns), min(rows, columns), dtype=torch.float64, generator=generator)
    frame = torch.linalg.qr(gaussian).Q
    tensor.copy_(frame if rows >= columns else frame.T)
