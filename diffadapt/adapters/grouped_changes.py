"""Changes that a method computes for all its sites together: once for each forward of the model.

A forward computes them in a hook before it starts, its layers read them, and its backward may need them
again: under gradient checkpointing, parts of the model run a second time in backward and must see the same
tensors. Several forwards may wait for their backward at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffadapt.algebra.expression import Expression
from diffadapt.algebra.recomputation import is_reentrant, next_node, node_of_recomputation

Changes = Sequence[Expression]  # one for each site


@dataclass(eq=False)
class Forward:
    """One forward of an adapted model.

    Attributes:
        changes: those that its layers share; None where there are none.
        running: whether it has not ended yet.
        first_node, end_node: the range of numbers of the autograd nodes that it created.
        in_backward: whether its backward has begun.
    """

    changes: Changes | None = None
    running: bool = True
    first_node: int = 0
    end_node: int = 0
    in_backward: bool = False

    def created(self, node: torch.autograd.graph.Node) -> bool:
        # autograd numbers nodes in the order of their creation, one count for each thread
        return self.first_node <= node._sequence_nr() < self.end_node

    def keep_alive_by(self, output: object) -> None:
        """Lets the graph of an output hold this object, as it holds all else that its backward needs."""
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                tensor.register_hook(self._enter_backward)  # a bound method, which refers to this object

    def _enter_backward(self, _: Tensor) -> None:
        self.in_backward = True


class GroupedChanges:
    """Computes a grouped method's changes when they are needed, and keeps them as long as they are.

    Args:
        compute: computes the changes of all sites from the present values of the tensors.
        trained_values: the present values of the trained tensors, as one vector.
        is_active: whether the changes act in a forward: neither merged nor at strength 0.
    """

    def __init__(
        self,
        compute: Callable[[], Changes],
        trained_values: Callable[[], Tensor],
        is_active: Callable[[], bool],
    ):
        self.compute = compute
        self.trained_values = trained_values
        self.is_active = is_active
        self.last_forward: Forward | None = None
        self.earlier_forwards: list[weakref.ref[Forward]] = []  # whose backward may still come
        # changes of a reentrant recomputation, with the numbers of its backward and its node
        self.recomputed: tuple[tuple[int, int], Changes] | None = None
        # changes computed without gradients, with the trained values that they belong to
        self.without_grad: tuple[Tensor, Changes] | None = None

    @property
    def in_forward(self) -> bool:
        """Whether a forward of the model runs now."""
        return self.last_forward is not None and self.last_forward.running

    @property
    def current(self) -> Changes | None:
        """The changes that the last forward shares among its layers, until its backward is over."""
        return None if self.last_forward is None else self.last_forward.changes

    def before_forward(self, *_) -> None:
        """A hook before the forward of an adapted model: computes the changes for it."""
        self.without_grad = None
        self.recomputed = None
        self._forget_finished_forwards()
        self.last_forward = Forward()
        if not torch.compiler.is_compiling():
            self.last_forward.first_node = next_node()
        if self.is_active():
            self.last_forward.changes = self.compute()

    def after_forward(self, _model: nn.Module, _inputs: object, output: object) -> None:
        """A hook after that forward: keeps the changes if blocks may run again in backward."""
        forward = self.last_forward
        forward.running = False
        if not torch.is_grad_enabled() or node_of_recomputation() is not None:
            forward.changes = None  # no backward comes, or the whole model just ran again within one
        elif not torch.compiler.is_compiling():
            forward.end_node = next_node()
            forward.keep_alive_by(output)

    def for_forward(self) -> Changes:
        """The changes for a layer that runs: in a forward of the model, or again in backward."""
        if self.in_forward and self.current is not None:
            return self.current
        node = node_of_recomputation()
        if node is None:  # a layer or block called alone
            return self.compute()
        if is_reentrant(node):
            return self._for_reentrant(node)
        # the forward whose block runs again is the one that created the checkpoint's node
        forwards = [self.last_forward]
        for reference in self.earlier_forwards:
            forwards.append(reference())
        for forward in forwards:
            if forward is not None and forward.changes is not None and forward.created(node):
                return forward.changes
        return self.compute()

    def for_reading(self) -> Changes:
        """The changes for the present values; without gradients, computed once for all sites."""
        if torch.is_grad_enabled():
            return self.compute()
        values = self.trained_values()
        if self.without_grad is not None:
            known_values, changes = self.without_grad
            # compared by value: optimizer steps and files write into the same tensors
            if known_values.device == values.device and torch.equal(known_values, values):
                return changes
        changes = self.compute()
        self.without_grad = (values, changes)
        return changes

    def _for_reentrant(self, node: torch.autograd.graph.Node) -> Changes:
        """The changes for all layers that a reentrant checkpoint runs again, computed once for its node.

        Such a checkpoint differentiates every part on its own, with a graph of its own.
        """
        key = (torch._C._current_graph_task_id(), node._sequence_nr())
        if self.recomputed is None or self.recomputed[0] != key:
            self.recomputed = (key, self.compute())
        return self.recomputed[1]

    def _forget_finished_forwards(self) -> None:
        """Moves the last forward to the earlier ones, and drops the changes whose backward is over."""
        if torch.compiler.is_compiling():
            return
        if self.last_forward is not None:
            self.earlier_forwards.append(weakref.ref(self.last_forward))
        no_backward_runs = node_of_recomputation() is None
        waiting = []
        for reference in self.earlier_forwards:
            forward = reference()
            if forward is None:
                continue
            if no_backward_runs and forward.in_backward:
                forward.changes = None
            if forward.changes is not None:
                waiting.append(weakref.ref(forward))
        self.earlier_forwards = waiting

    def __getstate__(self) -> dict:
        """Copies and pickles know no forward."""
        no_forward = {"last_forward": None, "earlier_forwards": [], "recomputed": None, "without_grad": None}
        return self.__dict__ | no_forward


def _tensors(output: object) -> Iterator[Tensor]:
    """Tensors in tuples, lists and mappings, and in the attributes of objects such as dataclasses."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__"):
            for value in vars(leaf).values():
                if isinstance(value, Tensor):
                    yield value
