"""The loss on images that were not trained on, with fixed noise and timesteps, and their pixels."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffadapt.data.batches import Batches
from diffadapt.data.encoding import EncodedCaptions
from diffadapt.data.examples import Example
from diffadapt.data.scaled_images import training_pixels
from diffadapt.models.base import BaseModel
from diffadapt.training.loop import attention_kernel
from diffadapt.training.objective import Objective

LARGEST_BATCH = 16


class HeldOutLoss:
    """The mean loss on examples, in float32, with the same noise and timesteps at each measurement.

    Args:
        resolution: side of the center crop in pixels.
        batch_size: images at once, as many as are generated at once; at most 16. No effect on the loss.
        rounds: noises and timesteps per example.
        encoded_captions: of the run, where the text encoders may be gone.
    """

    def __init__(
        self,
        model: BaseModel,
        examples: Sequence[Example],
        accelerator: Accelerator,
        *,
        resolution: int,
        batch_size: int,
        trigger_word: str | None = None,
        rounds: int = 1,
        encoded_captions: EncodedCaptions | None = None,
    ):
        self._sample_count = rounds * len(examples)
        self._batch_size = min(batch_size, LARGEST_BATCH)
        self._device = accelerator.device
        self._batches = Batches(
            model,
            examples,
            seed=0,  # not the run's: losses of runs with other seeds can then be compared
            resolution=resolution,
            center_crop=True,
            trigger_word=trigger_word,
            encoded_captions=encoded_captions,
        )
        # The adapter, if one is attached, works inside the denoiser.
        self._objective = Objective(
            model.denoiser, nn.Identity(), predict=model.predict, schedule=model.training_schedule()
        )

    @torch.no_grad()
    def measure(self) -> float:
        """The loss of the model as it is now."""
        total = 0.0
        for start in range(0, self._sample_count, self._batch_size):
            positions = range(start, min(self._sample_count, start + self._batch_size))
            batch = self._batches.batch(positions).to(self._device)
            with attention_kernel(batch):
                total += float(self._objective(batch)) * len(positions)  # the last batch may be smaller
        return total / self._sample_count


def center_pixels(examples: Sequence[Example], resolution: int) -> Tensor:
    """Center crops of the images, (N, 3, resolution, resolution) in [0, 1]."""
    pixels = [training_pixels(example.source, resolution) for example in examples]
    return torch.stack(pixels) / 2 + 0.5  # from [-1, 1]
