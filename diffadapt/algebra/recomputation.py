"""Which forward a block belongs to that gradient checkpointing runs again in backward.

A block that runs again does not say which forward it belongs to, and other forwards, seeds and optimizer
steps may lie between. Autograd numbers its nodes in the order of their creation, and checkpointing runs a
block again for a node that the forward created: the number of that node tells the forward.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

import torch

_MAX_SEEDS = 4096  # remembered between a forward and its backward


def next_node() -> int:
    """The number that autograd gives the next node."""
    return torch._C._autograd._get_sequence_nr()


def node_of_recomputation() -> torch.autograd.graph.Node | None:
    """The node for which a part of the model runs again in backward; None in a forward."""
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() < 0:
        return None
    return torch._C._current_autograd_node()


def is_reentrant(node: torch.autograd.graph.Node) -> bool:
    """Whether a node is of reentrant checkpointing (torch's, DeepSpeed's, Megatron's).

    It ran the block without gradients first.
    """
    return node.name().startswith("CheckpointFunction")


@dataclass
class SeedHistory:
    """The seeds of past forwards, and from which node on each was used."""

    nodes: list[int] = field(default_factory=list)
    seeds: list[int | None] = field(default_factory=list)

    def add(self, seed: int | None) -> None:
        """Notes a seed that forwards use from now on."""
        if self.seeds and self.seeds[-1] == seed:
            return
        if len(self.seeds) == _MAX_SEEDS:
            del self.nodes[0]
            del self.seeds[0]
        self.nodes.append(next_node())
        self.seeds.append(seed)

    def seed_of(self, node: torch.autograd.graph.Node) -> int | None:
        """The seed of the forward that created a node.

        Raises:
            RuntimeError: the node is older than the oldest seed that is remembered.
        """
        index = bisect.bisect_right(self.nodes, node._sequence_nr()) - 1
        if index < 0:
            raise RuntimeError(
                f"a checkpointed block runs again more than {_MAX_SEEDS} dropout seeds after its forward, "
                "so its mask is unknown; call backward earlier"
            )
        return self.seeds[index]
