"""Pictures that were not trained on: the loss on them with fixed noise and timesteps, and their pixels."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffadapt.data.batches import Batches
from diffadapt.data.examples import Example
from diffadapt.data.scaled_images import training_pixels
from diffadapt.models.base import BaseModel
from diffadapt.training.loop import attention_kernel
from diffadapt.training.objective import Objective

BATCH = 16


class HeldOutLoss:
    """The mean loss on examples, with the same noise and timesteps whenever it is asked, in float32.

    Args:
        rounds: noises and timesteps per example.
    """

    def __init__(
        self,
        model: BaseModel,
        examples: Sequence[Example],
        accelerator: Accelerator,
        *,
        resolution: int,
        trigger_word: str | None = None,
        rounds: int = 1,
    ):
        self._count, self._device = rounds * len(examples), accelerator.device
        cut = {"resolution": resolution, "center_crop": True, "trigger_word": trigger_word}
        self._batches = Batches(model, examples, seed=0, **cut)
        told = {"predict": model.predict, "schedule": model.training_schedule()}
        self._objective = Objective(model.denoiser, nn.Identity(), **told)

    @torch.no_grad()
    def measure(self) -> float:
        """Of the model as it is now."""
        total = 0.0
        for start in range(0, self._count, BATCH):
            places = range(start, min(self._count, start + BATCH))
            batch = self._batches.batch(places).to(self._device)
            with attention_kernel(batch.latents):
                total += float(self._objective(batch)) * len(places)
        return total / self._count


def pixels_of(examples: Sequence[Example], resolution: int) -> Tensor:
    """(N, 3, resolution, resolution) in [0, 1], the middle of each picture."""
    return torch.stack([training_pixels(e.source, resolution) for e in examples]) / 2 + 0.5
