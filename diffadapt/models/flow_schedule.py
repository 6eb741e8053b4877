"""Flow matching: a straight path from latents to noise, and the velocity along it.

Lipman et al. 2022 (arXiv 2210.02747); densities of times and their shift with the resolution: Esser et al.
2024 (arXiv 2403.03206), sections 3.1 and 5.3.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.common.keyed_random import Key, uniform
from diffadapt.models.noise_schedule import DENSITIES, TimestepSampling

MODE_SCALE = 1.29  # of the density "mode", the best one of the paper's table 1
SMALLEST_UNIFORM = 1e-6  # 0 would be a time without noise, where a logit is infinite


@dataclass(frozen=True)
class ResolutionShift:
    """A shift that grows with the image: exp(mu), mu linear in the number of image tokens.

    Attributes:
        base_tokens, max_tokens: numbers of tokens.
        base_shift, max_shift: mu at these numbers.
        patch_size: latent positions per token, along one side.
    """

    base_tokens: int = 256
    max_tokens: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15
    patch_size: int = 2

    @classmethod
    def of_scheduler(cls, config: Mapping[str, object], *, patch_size: int) -> ResolutionShift:
        """The shift with which diffusers' pipelines sample, by their scheduler's configuration."""
        return cls(
            base_tokens=config.get("base_image_seq_len", 256),
            max_tokens=config.get("max_image_seq_len", 4096),
            base_shift=config.get("base_shift", 0.5),
            max_shift=config.get("max_shift", 1.15),
            patch_size=patch_size,
        )

    def at(self, latents: Tensor) -> float:
        """The factor for latents (B, C, h, w)."""
        height, width = latents.shape[-2:]
        tokens = (height // self.patch_size) * (width // self.patch_size)
        # mu = base_shift + (max_shift - base_shift) (tokens - base_tokens) / (max_tokens - base_tokens)
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return math.exp(self.base_shift + slope * (tokens - self.base_tokens))


@dataclass(frozen=True)
class FlowSchedule:
    """Flow matching as a `NoiseSchedule`; its times s are noise levels, 0 for latents and 1 for noise.

    Attributes:
        density: of the times before the shift: logit_normal, uniform or mode.
        shift: k in s -> k s / (1 + (k - 1) s), which moves times towards noise.
    """

    density: str = "logit_normal"
    shift: float | ResolutionShift = 1.0

    def sample_timesteps(self, keys: Sequence[Key], latents: Tensor) -> Tensor:
        """Noise levels (B,), float32 in (0, 1); one uniform number per key."""
        values = [uniform(key, 1)[0] for key in keys]
        levels = density_quantiles(torch.tensor(values, dtype=torch.float64), self.density)  # (B,)
        shift = self.shift.at(latents) if isinstance(self.shift, ResolutionShift) else self.shift
        return (shift * levels / (1 + (shift - 1) * levels)).float()

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_s = (1 - s) x + s noise, (B, C, h, w) in float32."""
        level = timesteps.to(noise.device).float().view(-1, 1, 1, 1)  # (B, 1, 1, 1)
        return (1 - level) * original_samples.float() + level * noise.float()

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity of the path, d x_s / d s = noise - x, (B, C, h, w)."""
        return noise - latents

    def loss_weight(self, timesteps: Tensor, snr_gamma: float) -> Tensor:
        """Raises ValueError: Min-SNR weights belong to schedules of betas."""
        raise ValueError(f"--snr_gamma {snr_gamma}: {NO_SNR}")


NO_SNR = "flow matching has no Min-SNR weights; --timestep_density says which noise levels count most"
# Options of beta schedules, and why a flow-matching base does not take them.
INAPPLICABLE_OPTIONS = {
    "snr_gamma": NO_SNR,
    "prediction_type": "a flow-matching base predicts velocities, and nothing else",
    "noise_offset": "flow matching reaches pure noise, so its images need no offset to become dark or bright",
}


def flow_schedule(
    config: Mapping[str, object], sampling: TimestepSampling, *, patch_size: int
) -> FlowSchedule:
    """The training schedule of a base.

    Args:
        config: of the base's scheduler.
        sampling: the user's options.
        patch_size: latent positions per token, along one side.

    Raises:
        ValueError: the scheduler does not follow the straight path.
    """
    if "shift" not in config:
        raise ValueError(
            f"a {config.get('_class_name')} is no scheduler of flow matching; the base needs its own, such "
            "as FlowMatchEulerDiscreteScheduler"
        )
    shift = sampling.shift
    if shift is None and config.get("use_dynamic_shifting"):
        shift = ResolutionShift.of_scheduler(config, patch_size=patch_size)
    elif shift is None:
        shift = float(config["shift"])
    return FlowSchedule(sampling.density or "logit_normal", shift)


def density_quantiles(uniforms: Tensor, density: str) -> Tensor:
    """Times by inverse transform of uniform numbers, so that one number per sample decides.

    Args:
        uniforms: (B,) float64 in [0, 1).
        density: logit_normal, uniform or mode.

    Returns:
        (B,) float64 in (0, 1).

    Raises:
        ValueError: the density is unknown.
    """
    u = uniforms.clamp(SMALLEST_UNIFORM, 1 - SMALLEST_UNIFORM)
    if density == "uniform":
        return u
    if density == "logit_normal":
        # sigmoid(z), z standard normal: Esser et al., equation 19
        return torch.sigmoid(torch.special.ndtri(u))
    if density == "mode":
        # f(u) = 1 - u - m (cos^2(pi u / 2) - 1 + u): Esser et al., equation 20
        return 1 - u - MODE_SCALE * (torch.cos(math.pi * u / 2).square() - 1 + u)
    raise ValueError(f"--timestep_density {density}: choose from {', '.join(DENSITIES)}")
