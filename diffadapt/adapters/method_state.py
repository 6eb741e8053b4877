"""Parts of an adapter: one method's trained tensors for the sites it changes, first as a plan of shapes."""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffadapt.algebra.expression import Expression, Update
from diffadapt.algebra.layer_maps import without_autocast
from diffadapt.algebra.recomputation import (
    Forward,
    SeedHistory,
    is_reentrant,
    next_node,
    node_of_recomputation,
)
from diffadapt.methods.base import Method, Shapes
from diffadapt.methods.random_init import named_generator
from diffadapt.methods.site import Site


@dataclass(frozen=True)
class MethodPlan:
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

    def trained(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the trained tensors by name in a file: ``label/site/tensor``, ``label//shared``."""
        return self._named([method.trained_tensors(site) for method, site in self._pairs()])

    def stored(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors in a file: the trained ones, and those kept without training."""
        return self._named(
            [method.trained_tensors(site) | method.frozen_tensors(site) for method, site in self._pairs()]
        )

    def _pairs(self) -> list[tuple[Method, Site]]:
        return list(zip(self.methods, self.sites, strict=True))

    def _named(self, own: Sequence[Shapes]) -> dict[str, tuple[int, ...]]:
        named = {
            f"{self.label}/{site.name}/{key}": shape
            for site, shapes in zip(self.sites, own, strict=True)
            for key, shape in shapes.items()
        }
        shared = self.methods[0].shared_tensors(self.sites)
        return named | {f"{self.label}//{key}": shape for key, shape in shared.items()}

    def counts(self) -> dict[str, int]:
        """The number of values of every trained tensor."""
        return {name: math.prod(shape) for name, shape in self.trained().items()}

    @property
    def num_parameters(self) -> int:
        return sum(self.counts().values())


def plan_methods(
    method: Method, sites: Sequence[Site], ranks: Mapping[str, int] | None = None
) -> list[MethodPlan]:
    """One plan for every part of a method, over the sites whose kind it can change.

    ``ranks`` gives single sites another rank, by name, in the parts that have one. Raises ValueError when a
    part finds no site, or no part has a rank.
    """
    ranks, plans = ranks or {}, []
    if ranks and not any(hasattr(part, "rank") for part in method.members):
        raise ValueError(f"{method} has no rank, so there is none to choose for {next(iter(ranks))}")
    for number, part in enumerate(method.members):
        indices = tuple(i for i, site in enumerate(sites) if part.supports(site))
        if not indices:
            kinds = ", ".join(sorted(part.kinds))
            raise ValueError(f"{part.name} changes {kinds} layers, and the targets choose none of them")
        chosen = tuple(sites[i] for i in indices)
        ranked = [site.name for site in chosen if part.grouped and site.name in ranks]
        if ranked:
            raise ValueError(
                f"{part.name} shares its factors among layers, so {ranked[0]} cannot have a rank of its own "
                f"({ranks[ranked[0]]}); drop its rank pattern"
            )
        own = ranks if hasattr(part, "rank") else {}
        methods = tuple(replace(part, rank=own[s.name]) if s.name in own else part for s in chosen)
        label = part.name if len(method.members) == 1 else f"{number}.{part.name}"
        plans.append(MethodPlan(label, indices, chosen, methods))
    return plans


class MethodState(nn.Module):
    """Owns the tensors of one method: float32, or float64 for a float64 base."""

    def __init__(self, plan: MethodPlan, bases: Sequence[Tensor], seed: int):
        super().__init__()
        self.label, self.sites, self.methods, self.seed = plan.label, plan.sites, plan.methods, seed
        self.strength = 1.0
        self.dropout_seed: int | None = None
        self.merged = False
        self.dropout_seeds = SeedHistory()
        self.last_forward: Forward | None = None  # of the model, with the changes of grouped sites
        self.earlier_forwards: list[weakref.ref[Forward]] = []  # whose backward may still come
        self.recomputed: tuple[tuple[int, int], Sequence[Expression]] | None = None  # by backward and node
        self.exact: tuple[Tensor, Sequence[Expression]] | None = None  # trained values, and their changes
        method, first = self.methods[0], bases[0]
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        options = {"dtype": dtype, "device": first.device}
        self.tensors = nn.ModuleList(
            _parameters(method.trained_tensors(site), method.frozen_tensors(site), options)
            for method, site in zip(self.methods, self.sites, strict=True)
        )
        self.shared = _parameters(method.shared_tensors(self.sites), {}, options)
        self.constants = nn.Module()
        for key, constant in method.constants(self.sites, seed).items():
            constant = constant.to(**options) if constant.is_floating_point() else constant.to(first.device)
            self.constants.register_buffer(key, constant, persistent=False)
        self.shared_tensor_names = [
            method.shared_tensor_names(site) for method, site in zip(self.methods, self.sites, strict=True)
        ]
        self.change_plan = method.plan_changes(self.sites)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def grouped(self) -> bool:
        return self.methods[0].grouped

    @torch.no_grad()
    def start(self, bases: Sequence[Tensor]) -> None:
        """Give the tensors their starting values: a function of the seed, the label and the site's name."""
        if bases[0].device.type == "meta":
            return
        self.methods[0].init_shared_tensors(self.sites, bases, dict(self.shared.items()), self.seed)
        for index, (site, base) in enumerate(zip(self.sites, bases, strict=True)):
            generator = named_generator(self.seed, self.label, site.name)
            self.methods[index].init_tensors(site, self._lend(index), base, generator)

    def update(self, index: int, base: Tensor, *, in_forward: bool = False) -> Update:
        """What the part does to one site; ``in_forward``: as part of a forward of the model, for backward."""
        tensors = self._lend(index)
        with without_autocast(base.device.type):  # the factors meet in their own precision
            if self.grouped:
                tensors["change"] = (self._for_forward() if in_forward else self._for_reading())[index]
            return self.methods[index].update(self.sites[index], tensors, base)

    @property
    def in_forward(self) -> bool:
        """Whether a forward of the model runs now."""
        return self.last_forward is not None and self.last_forward.running

    @property
    def prepared(self) -> Sequence[Expression] | None:
        """The changes of grouped sites for the last forward and its backward."""
        return None if self.last_forward is None else self.last_forward.prepared

    def prepare(self, *_) -> None:
        """Compute what the sites of a grouped method share: a hook before the forward of an adapted model."""
        self.exact, self.recomputed = None, None
        self._track_forwards()
        self.last_forward = Forward()
        if not torch.compiler.is_compiling():
            self.last_forward.first_node = next_node()
        if self.strength != 0 and not self.merged:
            self.last_forward.prepared = self._prepared_now()

    def release(self, _model: nn.Module, _inputs: object, output: object) -> None:
        """After that forward; checkpointed blocks run again in backward, and need the same tensors there."""
        forward = self.last_forward
        forward.running = False
        if not torch.is_grad_enabled() or node_of_recomputation() is not None:
            forward.prepared = None
        elif not torch.compiler.is_compiling():
            forward.end_node = next_node()
            forward.live_with(output)

    def dropout(self, x: Tensor, index: int) -> Tensor:
        """The branch's input under the method's dropout, which acts while the adapter is in training mode and
        gradients are recorded: never while sampling, whatever mode the base is in.

        Raises: RuntimeError under reentrant checkpointing, whose forward recorded no gradients.
        """
        share = getattr(self.methods[index], "dropout", 0.0)
        if share == 0 or not self.training or not torch.is_grad_enabled():
            return x
        seed, node = self.dropout_seed, node_of_recomputation()
        if node is not None and is_reentrant(node):
            raise RuntimeError(
                f"dropout={share} needs checkpointing with use_reentrant=False: reentrant checkpointing runs "
                "the forward without gradients, where nothing is dropped, so gradients would be those of "
                "another output"
            )
        if node is not None:
            seed = self.dropout_seeds.used_for(node)
        elif not torch.compiler.is_compiling():
            self.dropout_seeds.use(seed)
        if seed is None:
            return F.dropout(x, share)
        generator = torch.Generator(x.device).manual_seed((seed * 1_000_003 + index) % 2**63)
        keep = torch.rand(x.shape, device=x.device, generator=generator) >= share
        return x * keep / (1 - share)

    def without_decay(self) -> list[nn.Parameter]:
        """The trained tensors that weight decay would take away from the base: absolute values, as DoRA's
        magnitudes, whose zeros are no start."""
        owned = [(self.methods[0], self.shared), *zip(self.methods, self.tensors, strict=True)]
        return [
            tensor
            for method, tensors in owned
            for key, tensor in tensors.items()
            if not method.has_weight_decay(key)
        ]

    def named_tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by its name in a file, in the order of ``MethodPlan.stored``."""
        own = {
            f"{self.label}/{site.name}/{key}": tensor
            for site, tensors in zip(self.sites, self.tensors, strict=True)
            for key, tensor in tensors.items()
        }
        return own | {f"{self.label}//{key}": tensor for key, tensor in self.shared.items()}

    def move_to(self, device: torch.device) -> None:
        """Move to the device of the adapted layers, unless they hold no data."""
        if self.device != device and "meta" not in (device.type, self.device.type):
            self.to(device)

    def _lend(self, index: int) -> dict[str, Tensor]:
        """A site's own tensors and those it shares, by the names its method uses."""
        lent = dict(self.tensors[index].items())
        for key, name in self.shared_tensor_names[index].items():
            lent[key] = self.shared[name] if name in self.shared else getattr(self.constants, name)
        return lent

    def _prepared_now(self) -> Sequence[Expression]:
        tensors = dict(self.shared.items()) | dict(self.constants.named_buffers())
        with without_autocast(self.device.type):
            return self.methods[0].compute_changes(self.change_plan, tensors)

    def _for_forward(self) -> Sequence[Expression]:
        """The prepared changes of the forward that runs, or runs again in backward."""
        if self.in_forward and self.prepared is not None:
            return self.prepared
        node = node_of_recomputation()
        if node is None:
            return self._prepared_now()
        if is_reentrant(node):  # it differentiates every part on its own, with a graph of its own
            return self._prepared_once(node)
        earlier = [self.last_forward, *(reference() for reference in self.earlier_forwards)]
        for forward in earlier:
            if forward is not None and forward.prepared is not None and forward.made(node):
                return forward.prepared
        return self._prepared_now()

    def _prepared_once(self, node: torch.autograd.graph.Node) -> Sequence[Expression]:
        """The changes of now, computed once for all layers that run again for a node."""
        key = torch._C._current_graph_task_id(), node._sequence_nr()
        if self.recomputed is None or self.recomputed[0] != key:
            self.recomputed = key, self._prepared_now()
        return self.recomputed[1]

    def _track_forwards(self) -> None:
        """Know the forwards whose graphs are alive; what they prepared goes once their backward is over."""
        if torch.compiler.is_compiling():
            return
        if self.last_forward is not None:
            self.earlier_forwards.append(weakref.ref(self.last_forward))
        alive = [earlier for reference in self.earlier_forwards if (earlier := reference()) is not None]
        if node_of_recomputation() is None:  # no backward runs
            for earlier in alive:
                earlier.prepared = None if earlier.in_backward else earlier.prepared
        self.earlier_forwards = [weakref.ref(earlier) for earlier in alive if earlier.prepared is not None]

    def _for_reading(self) -> Sequence[Expression]:
        """The changes for the values of now; without gradients, computed once for all sites."""
        if torch.is_grad_enabled():
            return self._prepared_now()
        values = torch.cat([tensor.detach().flatten() for tensor in self.shared.values()])
        if self.exact is not None:
            known, changes = self.exact
            if known.device == values.device and torch.equal(known, values):
                return changes
        self.exact = values, self._prepared_now()
        return self.exact[1]

    def _apply(self, fn, recurse: bool = True):
        """Move, but never change precision: trained tensors stay as wide as they were made."""

        def move(tensor: Tensor) -> Tensor:
            probe = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            return fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

        return super()._apply(move, recurse)

    def __getstate__(self) -> dict:
        forgotten = {"last_forward": None, "earlier_forwards": [], "recomputed": None, "exact": None}
        return self.__dict__ | forgotten | {"dropout_seeds": SeedHistory()}


def _parameters(trained: Shapes, frozen: Shapes, options: dict) -> nn.ParameterDict:
    made = OrderedDict()  # ordered, or a ParameterDict would sort the names
    for key, shape in (trained | frozen).items():
        made[key] = nn.Parameter(torch.zeros(shape, **options), requires_grad=key in trained)
    return nn.ParameterDict(made)
