"""What the class-conditional bases share: labels in the place of captions, and the null class of guidance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffadapt.models.latents import LatentBase


@dataclass
class ClassBase(LatentBase, ABC):
    """A base that is told the number of a class: a row of its class table."""

    @property
    @abstractmethod
    def table_rows(self) -> int:
        """Rows of the class table, with that of the null class."""

    @property
    @abstractmethod
    def null_class(self) -> int | None:
        """The row that means "no class"; None where the base was trained without one."""

    @abstractmethod
    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """The denoiser's prediction (B, C, h, w), what the schedule's prediction type says."""

    @property
    def num_classes(self) -> int:
        """Classes that can be asked for."""
        return self.table_rows - (self.null_class is not None)

    @property
    def empty_caption(self) -> int:
        """What a dropped label becomes. Raises ValueError for a base without a null class."""
        if self.null_class is None:
            raise ValueError(
                f"{self.source} has no null class, so no label can be dropped: --label_dropout 0"
            )
        return self.null_class

    def encode_captions(self, captions: Sequence[int]) -> dict[str, Tensor]:
        """``class_labels`` (B,), int64. Raises ValueError for a label that is no row of the table."""
        for label in captions:
            if isinstance(label, str) or not 0 <= label < self.table_rows:
                raise ValueError(
                    f"no class {label!r}: {self.source} has {self.num_classes} classes, numbered from 0"
                )
        return {"class_labels": torch.tensor(captions, dtype=torch.int64)}


def rows_of(model: LatentBase, names: Sequence[str], class_labels: str | None) -> list[int]:
    """The base's class for each class of the data.

    Raises: ValueError when the base is told words, has fewer classes, or the labels do not fit.
    """
    if not isinstance(model, ClassBase):
        raise ValueError(f"{model.source} is told words, not classes; use train_scripts/style_transfer.py")
    given = class_labels.split(",") if class_labels is not None else list(map(str, range(len(names))))
    if not all(label.strip().isdecimal() for label in given) or len(given) != len(names):
        raise ValueError(
            f"--class_labels takes one number for each of the {len(names)} classes, as 0,1,2; "
            f"got {class_labels!r}"
        )
    rows = [int(label) for label in given]
    known = set(range(model.table_rows)) - {model.null_class}
    if len(set(rows)) < len(rows) or not known.issuperset(rows):
        raise ValueError(
            f"the data has {len(names)} classes, told as {','.join(given)}: each must be another class of "
            f"{model.source}, which has {model.num_classes}"
        )
    return rows
