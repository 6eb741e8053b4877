"""Bases conditioned on classes: labels in the place of captions, and the null class of guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffadapt.models.base import BaseModel

if TYPE_CHECKING:
    import numpy
    from diffusers import DiffusionPipeline

    from diffadapt.adapters.class_table import ClassTable
    from diffadapt.models.sampling import ImageRequest, SamplingConfig


class ClassConditionedBase(BaseModel):
    """A base conditioned on the number of a class: a row of its class table."""

    @property
    def class_table(self) -> ClassTable:
        """The rows in use: the base's, or those of an attached adapter's new table."""
        return self.pipe.class_table

    @property
    def null_class(self) -> int | None:
        """The row that means "no class"; None where the base was trained without one."""
        return self.class_table.null_class

    @property
    def num_classes(self) -> int:
        """The number of classes, without the null class."""
        return len(self.class_table.labels)

    @property
    def empty_caption(self) -> int:
        """The null class, which a dropped label becomes. Raises ValueError for a base without one."""
        if self.null_class is None:
            raise ValueError(
                f"{self.source} has no null class, so no label can be dropped: --label_dropout 0"
            )
        return self.null_class

    def encode_captions(self, captions: Sequence[int]) -> dict[str, Tensor]:
        """`class_labels` (B,), int64, of classes and the null class. Raises ValueError for other labels."""
        table = self.class_table
        labels = [label for label in captions if label != table.null_class]
        table.check(labels, self.source)
        return {"class_labels": torch.tensor(captions, dtype=torch.int64)}

    def enable_text_encoder_training(self) -> None:
        raise ValueError(
            f"--train_text_encoder: {self.source} is conditioned on classes and has no text encoder; leave "
            "the option out; --adapter METHOD+class_embedding trains its table of classes"
        )

    @classmethod
    def pipeline_arguments(
        cls, requests: Sequence[ImageRequest], config: SamplingConfig
    ) -> dict[str, object]:
        if any(request.label is None for request in requests):
            raise ValueError("this base is conditioned on classes; give --class_labels instead of prompts")
        return {
            "class_labels": [request.label for request in requests],
            "guidance_scale": config.guidance_scale,
            "output_type": "np",  # the pipeline decodes its latents itself
        }

    @classmethod
    def decode_output(cls, pipe: DiffusionPipeline, output: numpy.ndarray, config: SamplingConfig) -> Tensor:
        return torch.from_numpy(output).permute(0, 3, 1, 2).float()  # (B, H, W, 3) -> (B, 3, H, W)
