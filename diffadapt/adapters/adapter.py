"""An adapter: the owner of every trained tensor, its strength, and the weights it makes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffadapt.adapters.fold import adapted_biases, adapted_weight, fold_merged
from diffadapt.adapters.layers import Entry, LayerState
from diffadapt.adapters.method_state import MethodState
from diffadapt.common.messages import did_you_mean
from diffadapt.methods import Method
from diffadapt.methods.site import Site


class Adapter(nn.Module):
    """Owner of every trained tensor of one adapter.

    Attributes:
        name: unique among the adapters of a model.
        method: the method it was attached with.
        sites: the weights it changes.
        seed: what the initial values were drawn from.
        ranks: the rank of sites where it differs from the method's.
        roots: the adapted models, by component name ("" for a bare model).
        parts: one state for each method that `method` combines. The name is part of the keys of training
            checkpoints.
        layer_states: what happens to each weight, by the site's name; filled by `attach`.
        frozen: the parameters that `attach` froze and `detach` gives their `requires_grad` back.
        hooks: what `detach` removes.
        unread_layers: layers that the targets of `attach` chose and that were left out, because no output of
            the model depends on them.
        base_values: fingerprints of the base, where its weights cannot be read at any time (sharded ones).
    """

    def __init__(
        self,
        name: str,
        method: Method,
        seed: int,
        ranks: Mapping[str, int],
        roots: dict[str, nn.Module],
    ):
        super().__init__()
        self.name = name
        self.method = method
        self.seed = seed
        self.ranks = dict(ranks)
        self.roots = dict(roots)
        self.parts = nn.ModuleList()
        self.sites: tuple[Site, ...] = ()
        self.layer_states: dict[str, LayerState] = {}
        self.frozen: list[nn.Parameter] = []
        self.hooks: list[RemovableHandle] = []
        self.unread_layers: tuple[str, ...] = ()
        self.base_values: dict[str, str] | None = None
        self._strength = 1.0

    def add_method_state(self, part: MethodState) -> None:
        # past nn.Module's own __setattr__: a reference, not a submodule that holds its owner
        object.__setattr__(part, "adapter", self)
        self.parts.append(part)

    @property
    def num_parameters(self) -> int:
        """Number of trained values."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    @property
    def strength(self) -> float:
        """`t` in `W + t (W' - W)`; 0 skips the adapter."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        # bool is a subclass of int, but `strength=True` is more likely a mistake than a 1
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"strength must be a finite number, got {value!r}")
        self._strength = float(value)
        for part in self.parts:
            part.strength = self._strength
        if self.merged:  # the weights hold the change at the old strength
            fold_merged(self.layer_states.values(), self.roots.values())

    @property
    def merged(self) -> bool:
        """Whether the adapter is folded into the weights now."""
        return any(part.merged for part in self.parts)

    def adapted_weight(self, site: str | Site) -> Tensor:
        """The exact changed weight of one site under this adapter alone, at its strength.

        Args:
            site: one of `sites`, or its name.

        Returns:
            A tensor of the weight's own shape, float32 (float64 on a float64 base). A class table for more
            classes than the base's has more rows.

        Raises:
            ValueError: no site has that name.
        """
        layer_state = self._layer_state(site)
        return adapted_weight(layer_state, self.entries(layer_state))

    def adapted_bias(self, site: str | Site) -> Tensor | None:
        """The exact changed bias `(out,)` of one site; None where the layer has none and gets none."""
        layer_state = self._layer_state(site)
        return adapted_biases(layer_state, self.entries(layer_state))[0]

    def set_dropout_seed(self, seed: int | None) -> None:
        """Makes dropout a function of `seed` and the site; None returns to torch's global generator."""
        for part in self.parts:
            part.dropout_seed = seed

    def _layer_state(self, site: str | Site) -> LayerState:
        name = site if isinstance(site, str) else site.name
        if name not in self.layer_states:
            hint = did_you_mean(name, self.layer_states)
            raise ValueError(f"adapter {self.name!r} has no site {name!r}{hint}")
        return self.layer_states[name]

    def entries(self, layer_state: LayerState) -> list[Entry]:
        """The entries of a layer that belong to this adapter."""
        owners = set(self.parts)
        return [entry for entry in layer_state.entries if entry.owner in owners]
