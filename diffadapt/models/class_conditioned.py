"""What the class-conditional bases share: labels in the place of captions, and the null class of guidance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffadapt.adapters.class_table import ClassTable
from diffadapt.models.latent_base import LatentBase


@dataclass
class ClassConditionedBase(LatentBase, ABC):
    """A base that is told the number of a class: a row of its class table."""

    @property
    def class_table(self) -> ClassTable:
        """The rows in use: the base's, or those of an attached adapter's new table."""
        return self.pipe.class_table

    @property
    def null_class(self) -> int | None:
        """The row that means "no class"; None where the base was trained without one."""
        return self.class_table.null_class

    @abstractmethod
    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """The denoiser's prediction (B, C, h, w), what the schedule's prediction type says."""

    @property
    def num_classes(self) -> int:
        """Classes that can be asked for."""
        return len(self.class_table.labels)

    @property
    def empty_caption(self) -> int:
        """What a dropped label becomes. Raises ValueError for a base without a null class."""
        if self.null_class is None:
            raise ValueError(
                f"{self.source} has no null class, so no label can be dropped: --label_dropout 0"
            )
        return self.null_class

    def encode_captions(self, captions: Sequence[int]) -> dict[str, Tensor]:
        """``class_labels`` (B,), int64, of classes and the null class. Raises ValueError for other labels."""
        table = self.class_table
        table.check((label for label in captions if label != table.null_class), self.source)
        return {"class_labels": torch.tensor(captions, dtype=torch.int64)}
