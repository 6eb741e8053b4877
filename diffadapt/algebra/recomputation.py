"""What a forward used, for gradient checkpointing, which runs parts of it again in backward.

A part that runs again does not say which forward it belongs to, and other forwards, seeds and optimizer steps
may lie between. Autograd numbers its nodes in the order of their making; checkpointing runs a part again for
a node that the forward made, whose number therefore lies in that forward's range.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from diffadapt.algebra.expression import Expression

_MOST_SEEDS = 4096  # between a forward and its backward


def next_node() -> int:
    """The number that autograd gives the next node."""
    return torch._C._autograd._get_sequence_nr()


def node_of_recomputation() -> torch.autograd.graph.Node | None:
    """The node for which a part of the model runs again in backward; None in a forward."""
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() < 0:
        return None
    return torch._C._current_autograd_node()


def is_reentrant(node: torch.autograd.graph.Node) -> bool:
    """Whether it is reentrant checkpointing (torch's, DeepSpeed's, Megatron's), which ran the part without
    gradients first."""
    return node.name().startswith("CheckpointFunction")


@dataclass(eq=False)
class Forward:
    """One forward of an adapted model.

    Attributes:
        prepared: the changes that its layers share; None where there are none.
        running: whether it has not ended yet.
        first_node, end_node: the range of numbers of the nodes that it made.
        in_backward: whether its backward has begun.
    """

    prepared: Sequence[Expression] | None = None
    running: bool = True
    first_node: int = 0
    end_node: int = 0
    in_backward: bool = False

    def made(self, node: torch.autograd.graph.Node) -> bool:
        return self.first_node <= node._sequence_nr() < self.end_node

    def live_with(self, output: object) -> None:
        """Let the graph of an output keep this, as it keeps all else that its backward needs."""
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                tensor.register_hook(self._enter_backward)

    def _enter_backward(self, _: Tensor) -> None:
        self.in_backward = True


@dataclass
class SeedHistory:
    """Seeds, and from which node on each was used."""

    nodes: list[int] = field(default_factory=list)
    seeds: list[int | None] = field(default_factory=list)

    def use(self, seed: int | None) -> None:
        """Note a seed that a forward uses from now on."""
        if self.seeds and self.seeds[-1] == seed:
            return
        if len(self.seeds) == _MOST_SEEDS:
            del self.nodes[0], self.seeds[0]
        self.nodes.append(next_node())
        self.seeds.append(seed)

    def used_for(self, node: torch.autograd.graph.Node) -> int | None:
        """The seed of the forward that made a node.

        Raises: RuntimeError for a node from before the oldest seed that is remembered.
        """
        index = bisect.bisect_right(self.nodes, node._sequence_nr()) - 1
        if index < 0:
            raise RuntimeError(
                f"a checkpointed block runs again more than {_MOST_SEEDS} dropout seeds after its forward, "
                "so its mask is unknown; call backward earlier"
            )
        return self.seeds[index]


def _tensors(output: object) -> Iterator[Tensor]:
    """Tensors in an output: in tuples, lists and mappings, and in the attributes of an object such as a
    dataclass."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__"):
            yield from (value for value in vars(leaf).values() if isinstance(value, Tensor))
