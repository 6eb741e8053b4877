"""Batches by position: latents, noise, timesteps and text states of any stretch of the stream of samples.

Everything in a batch is a function of (seed, epoch, sample): the same batch comes out after a resume, in any
number of processes, and whether or not latents are cached.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.data.examples import Draw, Example, Order
from diffadapt.data.images import View, check_images, open_image, to_pixels, view_of
from diffadapt.data.randomness import integer, normal, uniform
from diffadapt.models.families import Base

ENCODE_BATCH = 16  # pictures or prompts encoded at once


@dataclass(frozen=True)
class Batch:
    """One microstep's data. With prior preservation the second half of each tensor are the class examples."""

    latents: Tensor  # (B, C, h, w)
    noise: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,), int64
    conditions: dict[str, Tensor]  # each (B, ...)

    def to(self, device: torch.device) -> "Batch":
        conditions = {name: value.to(device) for name, value in self.conditions.items()}
        return Batch(self.latents.to(device), self.noise.to(device), self.timesteps.to(device), conditions)


class Batches:
    """Encodes examples once (moments of the autoencoder, text states) and makes batches from them."""

    def __init__(
        self,
        model: Base,
        examples: Sequence[Example],
        *,
        classes: Sequence[Example] = (),
        resolution: int,
        center_crop: bool,
        seed: int,
    ):
        self.model = model
        self.examples = {"instance": list(examples), "class": list(classes)}
        self.order = Order(len(examples), len(classes), seed)
        self.resolution = resolution
        self.timestep_count = model.training_schedule().config.num_train_timesteps
        self.seed = seed
        sources = [e.source for e in [*examples, *classes]]
        self._sizes = dict(zip(sources, check_images(sources), strict=True))
        self.center_crop = center_crop or all(width == height for width, height in self._sizes.values())
        self._captions = self._encode_captions()
        self._encoded = self._encode_all() if self.center_crop else None

    @property
    def description(self) -> str:
        """What was found, for people."""
        counts = f"{len(self.examples['instance'])} pictures"
        if self.examples["class"]:
            counts += f", {len(self.examples['class'])} class pictures"
        cut = "encoded once" if self._encoded else "cut at random and encoded in every step"
        return f"{counts}, {self.resolution} pixels, {cut}"

    def batch(self, positions: Sequence[int]) -> Batch:
        """The samples at these positions of the endless stream."""
        draws = self.order.draws(positions)
        encoded = self._encode(draws) if self._encoded is None else self._cached(draws)
        posterior = None
        if self.model.is_stochastic:
            shape = (encoded.shape[1] // 2, *encoded.shape[2:])
            posterior = self._normal("posterior", draws, shape).to(encoded.device)
        latents = self.model.draw_latents(encoded, posterior).cpu()
        captions = [self._captions[self._example(draw).caption] for draw in draws]
        conditions = {name: torch.stack([row[name] for row in captions]) for name in captions[0]}
        return Batch(
            latents=latents,
            noise=self._normal("noise", draws, latents.shape[1:]),
            timesteps=torch.tensor([integer(self._key("timestep", d), self.timestep_count) for d in draws]),
            conditions={**conditions, **self.model.size_conditions([self._view(draw) for draw in draws])},
        )

    def _example(self, draw: Draw) -> Example:
        return self.examples[draw.role][draw.index]

    def _key(self, purpose: str, draw: Draw) -> tuple[str | int, ...]:
        return (purpose, self.seed, draw.role, draw.epoch, draw.sample)

    def _normal(self, purpose: str, draws: Sequence[Draw], shape: Sequence[int]) -> Tensor:
        return torch.stack([normal(self._key(purpose, draw), shape) for draw in draws])

    def _cached(self, draws: Sequence[Draw]) -> Tensor:
        return torch.stack([self._encoded[draw.role][draw.index] for draw in draws])

    def _encode(self, draws: Sequence[Draw]) -> Tensor:
        """(len(draws), ...) encoded pictures, cut where each draw says."""
        pixels = []
        for draw in draws:
            image = open_image(self._example(draw).source)
            pixels.append(to_pixels(image, self.resolution, crop=self._crop(draw)))
        return self.model.encode_pixels(torch.stack(pixels)).cpu()

    def _crop(self, draw: Draw) -> tuple[float, float]:
        return (0.5, 0.5) if self.center_crop else tuple(uniform(self._key("crop", draw), 2))

    def _view(self, draw: Draw) -> View:
        size = (self.resolution, self.resolution)
        return view_of(self._sizes[self._example(draw).source], size, crop=self._crop(draw))

    def _encode_all(self) -> dict[str, list[Tensor]]:
        """Every picture once: role -> encoded picture per example."""
        encoded = {}
        for role, examples in self.examples.items():
            draws = [Draw(role, index, 0, index) for index in range(len(examples))]
            parts = [self._encode(draws[i : i + ENCODE_BATCH]) for i in range(0, len(draws), ENCODE_BATCH)]
            encoded[role] = list(torch.cat(parts)) if parts else []
            for example, values in zip(examples, encoded[role], strict=True):
                if not torch.isfinite(values).all():
                    raise ValueError(f"the autoencoder gives non-finite latents for {example.source}")
        return encoded

    def _encode_captions(self) -> dict[str | int, dict[str, Tensor]]:
        """Every caption once: caption -> its row of each condition."""
        captions = sorted({e.caption for examples in self.examples.values() for e in examples})
        rows = {}
        for start in range(0, len(captions), ENCODE_BATCH):
            some = captions[start : start + ENCODE_BATCH]
            encoded = {name: value.cpu() for name, value in self.model.encode_captions(some).items()}
            for index, caption in enumerate(some):
                rows[caption] = {name: value[index] for name, value in encoded.items()}
        return rows
