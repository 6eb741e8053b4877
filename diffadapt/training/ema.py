"""A moving average of the adapter's trained tensors: smoother than the values of the last step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from diffadapt.adapters.adapter import Adapter


class AdapterAverage:
    """The exponential moving average of an adapter.

    In update n the decay is min(decay, n / (n + 9)), as in diffusers, so that the start is soon forgotten.

    Args:
        decay: in [0, 1).

    Raises:
        ValueError: the decay is out of this range.
    """

    def __init__(self, adapter: Adapter, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"--ema_decay must be at least 0 and below 1, got {decay}")
        self._parameters = [p for p in adapter.parameters() if p.requires_grad]
        # average <- d * average + (1 - d) * value, with d the decay of the update
        self._average = EMAModel(self._parameters, decay=decay)

    def update(self) -> None:
        """Adds the current values; to be called once after every optimizer step."""
        self._average.step(self._parameters)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the context the adapter holds the average; afterwards its trained values, bit for bit."""
        trained_values = [p.detach().clone() for p in self._parameters]
        self._average.copy_to(self._parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, trained_values, strict=True):
                    parameter.copy_(value)

    def state(self) -> dict[str, object]:
        """The number of updates, and the averages in the order of the adapter's parameters."""
        return {"updates": self._average.optimization_step, "values": list(self._average.shadow_params)}

    def restore(self, state: dict[str, object]) -> None:
        """Puts a saved state back, in place."""
        values: list[Tensor] = state["values"]  # may lie on another device
        for average, value in zip(self._average.shadow_params, values, strict=True):
            average.copy_(value)
        self._average.optimization_step = state["updates"]
