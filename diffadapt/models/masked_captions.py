"""Bases that are told by a mask which text states are padding; the cache holds states without it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from diffadapt.models.transformer_base import TransformerBase

STATES = "encoder_hidden_states"
MASK = "encoder_attention_mask"


class MaskedCaptionsBase(TransformerBase):
    """A base whose captions have text states of different lengths.

    Its conditions are `STATES` (B, L, ...), L the longest length of the batch, and `MASK` (B, L), True for
    what is not padding.

    Class attributes:
        mask_argument: name of the mask of the prompts among the arguments of the pipeline's call.
    """

    mask_argument: ClassVar[str]

    @property
    @abstractmethod
    def token_shape(self) -> tuple[int, ...]:
        """The shape of the text states of one token."""

    def longest_conditions(self) -> dict[str, tuple[int, ...]]:
        length = self.max_sequence_length
        return {STATES: (length, *self.token_shape), MASK: (length,)}

    @abstractmethod
    def caption_states(self, caption: str) -> Tensor:
        """The text states of one caption without padding, (length, ...)."""

    def prompt_states(self, captions: list[str]) -> dict[str, Tensor]:
        rows = [self.caption_states(caption) for caption in captions]
        states, mask = pad_states(rows)
        return {STATES: states, MASK: mask}

    def collate_conditions(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        states, mask = pad_states([row[STATES] for row in rows])
        return {STATES: states, MASK: mask}

    @classmethod
    def embedding_arguments(
        cls, positive: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None
    ) -> dict[str, object]:
        return masked_embedding_arguments(cls.mask_argument, positive, negative)


def masked_embedding_arguments(
    mask_argument: str, positive: Mapping[str, Tensor], negative: Mapping[str, Tensor]
) -> dict[str, object]:
    """`BaseModel.embedding_arguments` of a pipeline that takes a mask under the name `mask_argument`."""
    return {
        "prompt_embeds": positive[STATES],
        mask_argument: positive[MASK],
        "negative_prompt_embeds": negative[STATES],
        f"negative_{mask_argument}": negative[MASK],
    }


def mask_or_none(mask: Tensor) -> Tensor | None:
    """The mask (B, L); None where nothing is padding, since attention without a mask is faster.

    On the meta device, where memory is counted, nothing is padding.
    """
    return None if mask.is_meta or mask.all() else mask


def without_padding(states: Tensor, mask: Tensor) -> list[Tensor]:
    """The rows (length, ...) of a batch of text states (B, L, ...) with its mask (B, L)."""
    if mask.is_meta:
        return list(states)  # memory is counted: nothing is padding
    return [row[row_mask] for row, row_mask in zip(states, mask, strict=True)]


def pad_states(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Text states of different lengths as one batch.

    Args:
        rows: (L_i, ...) each.

    Returns:
        States (B, L, ...) with zeros behind each row, L the longest length, and the mask (B, L).
    """
    longest = max(len(row) for row in rows)
    states = rows[0].new_zeros(len(rows), longest, *rows[0].shape[1:])  # (B, L, ...)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool, device=states.device)  # (B, L)
    for index, row in enumerate(rows):
        states[index, : len(row)] = row
        mask[index, : len(row)] = True
    return states, mask
