"""The interface of the noise that a base is trained with; `Objective` and `Batches` know no other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from diffadapt.common.keyed_random import Key

DENSITIES = ("logit_normal", "uniform", "mode")


@dataclass(frozen=True)
class TimestepSampling:
    """How a flow-matching base's times of training are sampled; None stands for the base's own way.

    Attributes:
        density: one of `DENSITIES`, before the shift.
        shift: towards noise, above 0; 1 for none.
    """

    density: str | None = None
    shift: float | None = None


def parse_timestep_shift(text: str | None) -> float | None:
    """Parses `--timestep_shift`: auto is None, the base's own shift.

    Raises:
        ValueError: the text is neither auto nor a positive number.
    """
    if text in (None, "auto"):
        return None
    try:
        shift = float(text)
    except ValueError:
        shift = math.nan
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"--timestep_shift is auto or a number above 0, got {text!r}")
    return shift


class NoiseSchedule(Protocol):
    """A family of noise levels: how they are sampled, the noisy latents, the target, the loss's weight."""

    def sample_timesteps(self, keys: Sequence[Key], latents: Tensor) -> Tensor:
        """One time per sample.

        Args:
            keys: of each sample's randomness, so that a time depends on its sample alone.
            latents: (B, C, h, w), for schedules that depend on the size of the image.

        Returns:
            (B,); integers for a discrete schedule, else float32.
        """
        ...

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noisy latents (B, C, h, w) at these times."""
        ...

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The prediction (B, C, h, w) with the least loss, were it known."""
        ...

    def loss_weight(self, timesteps: Tensor, snr_gamma: float) -> Tensor:
        """The weight (B,) of each sample's loss with `--snr_gamma`.

        Raises:
            ValueError: the schedule has no signal-to-noise weighting.
        """
        ...
