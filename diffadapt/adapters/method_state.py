"""One method of an adapter: its plan, from shapes alone, and its state, the tensors that it trains."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffadapt.adapters.grouped_changes import Changes, GroupedChanges
from diffadapt.algebra.expression import Update
from diffadapt.algebra.layer_maps import without_autocast
from diffadapt.algebra.recomputation import SeedHistory, is_reentrant, node_of_recomputation
from diffadapt.methods.base import Method, Shapes
from diffadapt.methods.random_init import named_generator
from diffadapt.methods.site import Site


@dataclass(frozen=True)
class MethodPlan:
    """The tensors that a `MethodState` will own.

    Attributes:
        label: unique among the methods of an adapter; the first piece of its names in a file.
        indices: which of the adapter's sites the method changes.
        sites: those sites.
        methods: the method for each of them; they differ in rank only.
    """

    label: str
    indices: tuple[int, ...]
    sites: tuple[Site, ...]
    methods: tuple[Method, ...]

    def trained_shapes(self) -> Shapes:
        """Shapes of the trained tensors by their names in a file: `label/site/tensor`, `label//shared`."""
        shapes: Shapes = {}
        for method, site in zip(self.methods, self.sites, strict=True):
            shapes |= self._site_names(site, method.trained_tensors(site))
        return shapes | self._shared_shapes()

    def stored_shapes(self) -> Shapes:
        """Shapes of all tensors in a file: the trained ones, and those that are stored without training."""
        shapes: Shapes = {}
        for method, site in zip(self.methods, self.sites, strict=True):
            site_shapes = method.trained_tensors(site) | method.frozen_tensors(site)
            shapes |= self._site_names(site, site_shapes)
        return shapes | self._shared_shapes()

    def counts(self) -> dict[str, int]:
        """The number of values of every trained tensor."""
        return {name: math.prod(shape) for name, shape in self.trained_shapes().items()}

    @property
    def num_parameters(self) -> int:
        return sum(self.counts().values())

    def _site_names(self, site: Site, shapes: Shapes) -> Shapes:
        return {f"{self.label}/{site.name}/{key}": shape for key, shape in shapes.items()}

    def _shared_shapes(self) -> Shapes:
        shared = self.methods[0].shared_tensors(self.sites)
        return {f"{self.label}//{key}": shape for key, shape in shared.items()}


def plan_methods(
    method: Method, sites: Sequence[Site], ranks: Mapping[str, int] | None = None
) -> list[MethodPlan]:
    """Plans every method that a method combines, over the sites whose kind it can change.

    Args:
        ranks: the rank of single sites by name, for the methods that have a rank.

    Raises:
        ValueError: a method finds no site, or none has a rank.
    """
    ranks = ranks or {}
    if ranks and not any(hasattr(member, "rank") for member in method.members):
        raise ValueError(f"{method} has no rank, so there is none to choose for {next(iter(ranks))}")
    plans = []
    for number, member in enumerate(method.members):
        indices = []
        member_sites = []
        for index, site in enumerate(sites):
            if member.supports(site):
                indices.append(index)
                member_sites.append(site)
        if not indices:
            kinds = ", ".join(sorted(member.kinds))
            raise ValueError(f"{member.name} changes {kinds} layers, and the targets choose none of them")
        member_methods = []
        for site in member_sites:
            has_rank_pattern = site.name in ranks
            if has_rank_pattern and member.grouped:
                raise ValueError(
                    f"{member.name} shares its factors among layers, so {site.name} cannot have a rank of "
                    f"its own ({ranks[site.name]}); drop its rank pattern"
                )
            if has_rank_pattern and hasattr(member, "rank"):
                member_methods.append(replace(member, rank=ranks[site.name]))
            else:
                member_methods.append(member)
        # numbered, since a combination may hold the same method twice
        label = member.name if len(method.members) == 1 else f"{number}.{member.name}"
        plans.append(MethodPlan(label, tuple(indices), tuple(member_sites), tuple(member_methods)))
    return plans


class MethodState(nn.Module):
    """Owns the tensors of one method, in float32, or in float64 for a float64 base.

    Attributes:
        tensors: the tensors of each site, in the order of `sites`.
        shared: the tensors trained for several sites together.
        constants: buffers that are computed again from the seed and never stored.
        strength: `t` in `W + t (W' - W)`.
        merged: whether the changes are folded into the weights now.
        dropout_seed: what dropout is a function of; None for torch's global generator.
        grouped_changes: of a method that computes the changes of all sites together; else None.

    The names `tensors` and `shared` are keys of training checkpoints.
    """

    def __init__(self, plan: MethodPlan, bases: Sequence[Tensor], seed: int):
        super().__init__()
        self.label = plan.label
        self.sites = plan.sites
        self.methods = plan.methods
        self.seed = seed
        self.strength = 1.0
        self.merged = False
        self.dropout_seed: int | None = None
        self.dropout_seeds = SeedHistory()

        method = self.methods[0]  # what is not of a single site is the same for every rank
        device = bases[0].device
        dtype = torch.float64 if bases[0].dtype == torch.float64 else torch.float32
        self.tensors = nn.ModuleList()
        self.shared_tensor_names = []
        for site_method, site in zip(self.methods, self.sites, strict=True):
            trained = site_method.trained_tensors(site)
            frozen = site_method.frozen_tensors(site)
            self.tensors.append(_parameters(trained, frozen, dtype, device))
            self.shared_tensor_names.append(site_method.shared_tensor_names(site))
        self.shared = _parameters(method.shared_tensors(self.sites), {}, dtype, device)
        self.constants = nn.Module()
        for key, constant in method.constants(self.sites, seed).items():
            # indices stay integers
            constant_dtype = dtype if constant.is_floating_point() else constant.dtype
            constant = constant.to(dtype=constant_dtype, device=device)
            self.constants.register_buffer(key, constant, persistent=False)

        self.change_plan = method.plan_changes(self.sites)
        self.grouped_changes: GroupedChanges | None = None
        if method.grouped:
            self.grouped_changes = GroupedChanges(
                self._compute_changes, self._shared_values, self._acts_in_forward
            )

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def grouped(self) -> bool:
        """Whether the changes of all sites are computed together."""
        return self.grouped_changes is not None

    @torch.no_grad()
    def start(self, bases: Sequence[Tensor]) -> None:
        """Gives the tensors their initial values: a function of the seed, the label and the site's name."""
        if bases[0].device.type == "meta":  # shapes alone, where parameters are only counted
            return
        self.methods[0].init_shared_tensors(self.sites, bases, dict(self.shared.items()), self.seed)
        for index, (site, base) in enumerate(zip(self.sites, bases, strict=True)):
            generator = named_generator(self.seed, self.label, site.name)
            self.methods[index].init_tensors(site, self._site_tensors(index), base, generator)

    def update(self, index: int, base: Tensor, *, in_forward: bool = False) -> Update:
        """The change of one site.

        Args:
            index: of the site in `sites`.
            base: its frozen weight.
            in_forward: whether a layer asks while it runs, so that a backward may follow.
        """
        tensors = self._site_tensors(index)
        with without_autocast(base.device.type):  # the factors meet in their own precision
            if self.grouped_changes is not None:
                grouped = self.grouped_changes
                changes = grouped.for_forward() if in_forward else grouped.for_reading()
                tensors["change"] = changes[index]
            return self.methods[index].update(self.sites[index], tensors, base)

    def dropout(self, x: Tensor, index: int) -> Tensor:
        """The input of a site's change under the method's dropout.

        Dropout acts while the adapter is in training mode and gradients are recorded: never while sampling,
        whatever mode the base is in.

        Args:
            x: the input of the layer, of any shape.
            index: of the site in `sites`.

        Raises:
            RuntimeError: reentrant checkpointing, whose forward recorded no gradients.
        """
        probability = getattr(self.methods[index], "dropout", 0.0)
        if probability == 0 or not self.training or not torch.is_grad_enabled():
            return x
        # The layer may run again in backward: then it needs the mask of its own forward, and other seeds may
        # have been set since.
        seed = self.dropout_seed
        node = node_of_recomputation()
        if node is not None:
            if is_reentrant(node):
                raise RuntimeError(
                    f"dropout={probability} needs checkpointing with use_reentrant=False: reentrant "
                    "checkpointing runs the forward without gradients, where nothing is dropped, so "
                    "gradients would be those of another output"
                )
            seed = self.dropout_seeds.seed_of(node)
        elif not torch.compiler.is_compiling():
            self.dropout_seeds.add(seed)
        if seed is None:
            return F.dropout(x, probability)
        # another mask for every (seed, index), as long as there are fewer than 1,000,003 sites
        generator = torch.Generator(x.device).manual_seed((seed * 1_000_003 + index) % 2**63)
        # as F.dropout: x m / (1 - p) with m ~ Bernoulli(1 - p), so that the mean stays
        keep = torch.rand(x.shape, device=x.device, generator=generator) >= probability
        return x * keep / (1 - probability)

    def without_decay(self) -> list[nn.Parameter]:
        """The trained tensors that weight decay must leave alone.

        These are absolute values such as DoRA's magnitudes, whose zeros are far from the base.
        """
        methods_and_tensors = [
            (self.methods[0], self.shared),
            *zip(self.methods, self.tensors, strict=True),
        ]
        parameters = []
        for method, tensors in methods_and_tensors:
            for key, tensor in tensors.items():
                if not method.has_weight_decay(key):
                    parameters.append(tensor)
        return parameters

    def named_tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by its name in a file, in the order of `MethodPlan.stored_shapes`."""
        tensors_by_name = {}
        for site, tensors in zip(self.sites, self.tensors, strict=True):
            for key, tensor in tensors.items():
                tensors_by_name[f"{self.label}/{site.name}/{key}"] = tensor
        for key, tensor in self.shared.items():
            tensors_by_name[f"{self.label}//{key}"] = tensor
        return tensors_by_name

    def move_to(self, device: torch.device) -> None:
        """Moves to the device of the adapted layers, unless they hold no data."""
        if self.device != device and "meta" not in (device.type, self.device.type):
            self.to(device)

    def _site_tensors(self, index: int) -> dict[str, Tensor]:
        """A site's own tensors and those it shares, by the names its method uses."""
        tensors = dict(self.tensors[index].items())
        for key, name in self.shared_tensor_names[index].items():
            tensors[key] = self.shared[name] if name in self.shared else getattr(self.constants, name)
        return tensors

    def _compute_changes(self) -> Changes:
        tensors = dict(self.shared.items()) | dict(self.constants.named_buffers())
        with without_autocast(self.device.type):
            return self.methods[0].compute_changes(self.change_plan, tensors)

    def _shared_values(self) -> Tensor:
        return torch.cat([tensor.detach().flatten() for tensor in self.shared.values()])

    def _acts_in_forward(self) -> bool:
        return self.strength != 0 and not self.merged

    def _apply(self, fn, recurse: bool = True):
        """Moves, but never changes precision: trained tensors stay as wide as they were made."""

        def move(tensor: Tensor) -> Tensor:
            # `fn` is opaque (`.to`, `.half`, `.cuda`): an empty tensor shows what it does, at no cost
            probe = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            return fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

        return super()._apply(move, recurse)

    def __getstate__(self) -> dict:
        """Copies and pickles know no forward."""
        return self.__dict__ | {"dropout_seeds": SeedHistory()}


def _parameters(
    trained: Shapes, frozen: Shapes, dtype: torch.dtype, device: torch.device
) -> nn.ParameterDict:
    parameters = OrderedDict()  # ordered, or a ParameterDict would sort the names
    for key, shape in (trained | frozen).items():
        zeros = torch.zeros(shape, dtype=dtype, device=device)
        parameters[key] = nn.Parameter(zeros, requires_grad=key in trained)
    return nn.ParameterDict(parameters)
