"""Parts of an adapter: one method's trained tensors for the sites it changes, first as a plan of shapes."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffadapt.methods.base import Method
from diffadapt.site import Site
from diffadapt.update import Update


@dataclass(frozen=True)
class PartPlan:
    """What a part will own, from shapes alone.

    Attributes:
        label: unique among the parts of an adapter; the first piece of its names in a file.
        indices: which of the adapter's sites it changes.
        sites: those sites.
        methods: the method of each; they differ in rank only.
    """

    label: str
    indices: tuple[int, ...]
    sites: tuple[Site, ...]
    methods: tuple[Method, ...]

    def stored(self) -> dict[str, tuple[int, ...]]:
        """The shape of every stored tensor by its name in a file: ``label/site/tensor``."""
        return {
            f"{self.label}/{site.name}/{key}": shape
            for site, method in zip(self.sites, self.methods, strict=True)
            for key, shape in method.trained(site).items()
        }

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.stored().values())


def plan_parts(
    method: Method, sites: Sequence[Site], ranks: Mapping[str, int] | None = None
) -> list[PartPlan]:
    """One plan for every part of a method, over the sites whose kind it can change.

    ``ranks`` gives single sites another rank, by name. Raises ValueError when a part finds no site.
    """
    ranks, plans = ranks or {}, []
    for number, part in enumerate(method.parts):
        indices = tuple(i for i, site in enumerate(sites) if site.kind in part.kinds)
        if not indices:
            kinds = ", ".join(sorted(part.kinds))
            raise ValueError(f"{part.name} changes {kinds} layers, and the targets choose none of them")
        chosen = tuple(sites[i] for i in indices)
        methods = tuple(replace(part, rank=ranks[s.name]) if s.name in ranks else part for s in chosen)
        label = part.name if len(method.parts) == 1 else f"{number}.{part.name}"
        plans.append(PartPlan(label, indices, chosen, methods))
    return plans


class Part(nn.Module):
    """Owns the tensors of one method, site by site: float32, or float64 for a float64 base."""

    def __init__(self, plan: PartPlan, bases: Sequence[Tensor]):
        super().__init__()
        self.label, self.sites, self.methods = plan.label, plan.sites, plan.methods
        self.strength = 1.0
        self.dropout_seed: int | None = None
        self.tensors = nn.ModuleList()
        for site, method, base in zip(self.sites, self.methods, bases, strict=True):
            dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
            shapes = method.trained(site)
            zeros = (
                (key, torch.zeros(shape, dtype=dtype, device=base.device)) for key, shape in shapes.items()
            )
            self.tensors.append(nn.ParameterDict(OrderedDict(zeros)))  # ordered, or it would sort the names

    @torch.no_grad()
    def start(self, bases: Sequence[Tensor], seed: int) -> None:
        """Give the tensors their starting values: a function of the seed, the label and the site's name."""
        for site, method, tensors, base in zip(self.sites, self.methods, self.tensors, bases, strict=True):
            if base.device.type != "meta":
                method.start(site, dict(tensors.items()), base, site_generator(seed, self.label, site.name))

    def update(self, index: int, base: Tensor) -> Update:
        return self.methods[index].update(self.sites[index], self.tensors[index], base)

    def dropped(self, x: Tensor, index: int, training: bool) -> Tensor:
        """The branch's input under the method's dropout."""
        share = getattr(self.methods[index], "dropout", 0.0)
        if not training or share == 0:
            return x
        if self.dropout_seed is None:
            return F.dropout(x, share)
        generator = torch.Generator(x.device).manual_seed((self.dropout_seed * 1_000_003 + index) % 2**63)
        keep = torch.rand(x.shape, device=x.device, generator=generator) >= share
        return x * keep / (1 - share)

    def named(self) -> Mapping[str, Tensor]:
        """Every stored tensor by its name in a file, as in ``PartPlan.stored``."""
        return {
            f"{self.label}/{site.name}/{key}": tensor
            for site, tensors in zip(self.sites, self.tensors, strict=True)
            for key, tensor in tensors.items()
        }

    def follow(self, device: torch.device) -> None:
        """Move to the device of the adapted layers, unless they hold no data."""
        held = next(self.parameters(), None)
        if held is not None and held.device != device and "meta" not in (device.type, held.device.type):
            self.to(device)

    def _apply(self, fn, recurse: bool = True):
        """Move, but never change precision: trained tensors stay as wide as they were made."""
        moved = {dtype: fn(torch.empty(0, dtype=dtype)) for dtype in {p.dtype for p in self.parameters()}}
        return super()._apply(
            lambda t: fn(t) if moved[t.dtype].dtype == t.dtype else t.to(moved[t.dtype].device), recurse
        )


def site_generator(seed: int, *words: str) -> torch.Generator:
    """A CPU generator seeded by a number and names: the same on every machine, in any order of sites."""
    digest = hashlib.sha256("/".join([str(seed), *words]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
