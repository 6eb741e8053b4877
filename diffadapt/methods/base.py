"""The contract of a method: a frozen record of options, and functions of one layer's shapes and tensors."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from diffadapt.algebra.expression import Expression, Update
from diffadapt.methods.site import LayerKind, Site

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Method:
    """A way to change weights. Its dataclass fields are its options, which an adapter file stores.

    A new method defines `trained_tensors` and `update`, most also `init_tensors`. The other functions
    have defaults that suit methods whose layers do not depend on each other.

    Attributes:
        name: the registered name.
        kinds: the kinds of layers it can change.
        learning_rate: the recommended rate for AdamW, used when none is given.
        grouped: whether the changes of all layers are computed together, by `compute_changes`.
        library: the library whose code computes the change, `diffadapt` or `peft`. PEFT's methods define
            none of the functions below: their tensors are known once PEFT has wrapped the layers.
        extra_targets: target presets that it changes in addition to the requested targets.
        trains_whole_weights: whether it trains a tensor of the weight's own size, for which a quantised base
            saves no memory.
    """

    name: ClassVar[str]
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({"linear", "conv"})
    learning_rate: ClassVar[float]
    grouped: ClassVar[bool] = False
    library: ClassVar[str] = "diffadapt"
    extra_targets: ClassVar[tuple[str, ...]] = ()
    trains_whole_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            accepted_types = str(field.type).split(" | ")  # annotations are text, e.g. "float | None"
            if value is None and "None" in accepted_types:
                continue
            if "float" in accepted_types and type(value) in (int, float):
                if not abs(value) <= sys.float_info.max:
                    raise ValueError(f"{self.name}: {field.name} must be a finite number, got {value!r}")
                continue
            # a tuple's annotation, such as tuple[Method, ...], is not the name of its type
            if type(value).__name__ not in (*accepted_types, "tuple"):
                raise ValueError(f"{self.name}: {field.name} must be {field.type}, got {value!r}")

    @property
    def members(self) -> tuple[Method, ...]:
        """The methods that it combines; only itself unless it was made with `+`."""
        return (self,)

    @property
    def settings(self) -> dict:
        """Every option, as a file stores it, so that later defaults do not change what the file means."""
        return asdict(self)

    @property
    def config(self) -> dict:
        """The options that differ from their defaults, for people to read."""
        defaults = {field.name: field.default for field in fields(self)}
        changed_options = {}
        for key, value in self.settings.items():
            if defaults[key] != value:  # an option without a default has MISSING there, which equals nothing
                changed_options[key] = value
        return changed_options

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.config.items())
        return f"{self.name}({options})" if options else self.name

    def supports(self, site: Site) -> bool:
        """Whether the method changes a layer like this one."""
        return site.kind in self.kinds

    def trained_tensors(self, site: Site) -> Shapes:
        """Names and shapes of the tensors trained for one site alone.

        Raises:
            ValueError: the method cannot change the site.
        """
        raise TypeError(f"{type(self).__name__} does not define trained_tensors()")

    def frozen_tensors(self, site: Site) -> Shapes:
        """Names and shapes of tensors that a file stores for a site although they are not trained."""
        return {}

    def shared_tensors(self, sites: Sequence[Site]) -> Shapes:
        """Names and shapes of the tensors trained once for several sites."""
        return {}

    def constants(self, sites: Sequence[Site], seed: int) -> dict[str, Tensor]:
        """Frozen random tensors (float64, on the CPU), regenerated from the seed and never stored."""
        return {}

    def shared_tensor_names(self, site: Site) -> dict[str, str]:
        """The shared tensors and constants that `update` receives for a site.

        Returns:
            The name `update` uses for each tensor -> its name in `shared_tensors` or `constants`.
        """
        return {}

    def ranks_where_count_drops(self, site: Site) -> tuple[int, ...]:
        """The ranks at which a site may train fewer values than at the rank one below."""
        return ()

    def has_weight_decay(self, key: str) -> bool:
        """Whether weight decay may pull the trained tensor `key` to zero, as where zero is no change."""
        return True

    def init_tensors(
        self, site: Site, tensors: Mapping[str, Tensor], base: Tensor, generator: torch.Generator
    ) -> None:
        """Fill a site's tensors, in place, so that the layer's output does not change.

        Args:
            site: the site.
            tensors: those of `trained_tensors` and `frozen_tensors`, all zeros, and the shared ones.
            base: the frozen weight, in its own shape.
            generator: a CPU generator seeded for this site.
        """

    def init_shared_tensors(
        self, sites: Sequence[Site], bases: Sequence[Tensor], tensors: Mapping[str, Tensor], seed: int
    ) -> None:
        """Fill the shared tensors, all zeros, in place.

        Args:
            sites: all sites of the method.
            bases: their frozen weights, in the same order.
            tensors: those of `shared_tensors`.
            seed: the adapter's seed.
        """

    def plan_changes(self, sites: Sequence[Site]) -> object:
        """What `compute_changes` needs of the sites' shapes, worked out once per adapter."""
        return sites

    def compute_changes(self, plan: object, tensors: Mapping[str, Tensor]) -> Sequence[Expression] | None:
        """The change of every site of a grouped method, computed once per forward of the model.

        Args:
            plan: the result of `plan_changes`.
            tensors: the shared tensors and the constants, by name.

        Returns:
            One expression per site, which `update` receives as `tensors["change"]`; None for methods whose
            sites do not depend on each other.
        """
        return None

    def update(self, site: Site, tensors: Mapping[str, Tensor], base: Tensor) -> Update:
        """The change of one layer.

        Args:
            site: the site.
            tensors: the site's tensors and those of `shared_tensor_names`.
            base: the frozen weight, in its own shape.
        """
        raise TypeError(f"{type(self).__name__} does not define update()")
