"""What a method is: a frozen record of options, and three functions of one site."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from diffadapt.algebra.expression import Expression, Update
from diffadapt.methods.site import LayerKind, Site

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Method:
    """A way to change weights. Its fields are its options and its JSON config.

    Class attributes:
        name: the registered name.
        kinds: the kinds of layers it can change.
        learning_rate: recommended rate for AdamW, used when none is given.
        grouped: whether the changes of all sites are computed together, by ``compute_changes``.
        extra_targets: target presets the method changes besides those it is given.
    """

    name: ClassVar[str]
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({"linear", "conv"})
    learning_rate: ClassVar[float]
    grouped: ClassVar[bool] = False
    extra_targets: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value, wanted = getattr(self, field.name), str(field.type).split(" | ")
            if "float" in wanted and type(value) in (int, float):
                if not abs(value) <= sys.float_info.max:
                    raise ValueError(f"{self.name}: {field.name} must be a finite number, got {value!r}")
                continue
            if type(value).__name__ not in (*wanted, "tuple") and not (value is None and "None" in wanted):
                raise ValueError(f"{self.name}: {field.name} must be {field.type}, got {value!r}")

    @property
    def members(self) -> tuple[Method, ...]:
        """The methods this one combines; itself alone unless made with ``+``."""
        return (self,)

    @property
    def settings(self) -> dict:
        """Every option, as a file stores it: later defaults do not change what it means."""
        return asdict(self)

    @property
    def config(self) -> dict:
        """The options that differ from their defaults, for people to read."""
        defaults = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        return {key: value for key, value in self.settings.items() if defaults.get(key, MISSING) != value}

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.config.items())
        return f"{self.name}({options})" if options else self.name

    def supports(self, site: Site) -> bool:
        """Whether the method changes a layer like this one."""
        return site.kind in self.kinds

    def trained_tensors(self, site: Site) -> Shapes:
        """Names and shapes of a site's trained tensors. Raises ValueError for a site it cannot change."""
        raise TypeError(f"{type(self).__name__} does not define trained()")

    def ranks_where_count_drops(self, site: Site) -> tuple[int, ...]:
        """The ranks at which a site's number of trained values may be lower than at the rank before."""
        return ()

    def has_weight_decay(self, key: str) -> bool:
        """Whether weight decay may pull the trained tensor ``key`` towards zero: zeros are no change."""
        return True

    def frozen_tensors(self, site: Site) -> Shapes:
        """Further tensors a site keeps in the file without training them."""
        return {}

    def shared_tensors(self, sites: Sequence[Site]) -> Shapes:
        """Names and shapes of the tensors trained once for several sites."""
        return {}

    def constants(self, sites: Sequence[Site], seed: int) -> dict[str, Tensor]:
        """Frozen random tensors (float64, on the CPU), regenerated from the seed and never stored."""
        return {}

    def shared_tensor_names(self, site: Site) -> dict[str, str]:
        """The shared tensors and constants a site's ``update`` receives: its name for each -> their name."""
        return {}

    def init_shared_tensors(
        self, sites: Sequence[Site], bases: Sequence[Tensor], tensors: Mapping[str, Tensor], seed: int
    ) -> None:
        """Fill the shared tensors, which arrive as zeros."""

    def plan_changes(self, sites: Sequence[Site]) -> object:
        """What ``compute_changes`` needs to know of the sites' shapes, worked out once."""
        return sites

    def compute_changes(self, plan: object, tensors: Mapping[str, Tensor]) -> Sequence[Expression] | None:
        """The change of every site, computed together once per forward of the model; ``update`` gets it as
        ``change``. None for methods whose sites do not depend on each other."""
        return None

    def init_tensors(
        self, site: Site, tensors: Mapping[str, Tensor], base: Tensor, generator: torch.Generator
    ) -> None:
        """Fill the tensors, which arrive as zeros, so that the layer's output does not change."""

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        """What the tensors do to the layer whose frozen weight is ``base``."""
        raise TypeError(f"{type(self).__name__} does not define update()")
