"""Flow-matching bases with CLIP text encoders, which can be trained, beside T5, which cannot."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffadapt.models.flow_matching import FlowMatchingBase
from diffadapt.models.text_conditioned import IDS

T5_STATES = "t5_states"


class ClipWithT5Base(FlowMatchingBase):
    """A base whose captions become token ids of CLIP and states of T5 while CLIP is trained.

    Class attributes:
        clip_encoders: component names of the CLIP text encoders.
        clip_tokenizers: component names of their tokenizers, in the same order.
    """

    clip_encoders: ClassVar[tuple[str, ...]]
    clip_tokenizers: ClassVar[tuple[str, ...]]

    @abstractmethod
    def t5_states(self, captions: list[str]) -> Tensor:
        """T5's part of `prompt_states`, (B, length, width)."""

    @abstractmethod
    def states_with_clip(self, token_ids: Sequence[Tensor], t5_states: Tensor) -> dict[str, Tensor]:
        """The same conditions as `prompt_states`, with gradients of the CLIP text encoders.

        Args:
            token_ids: (B, length) of each CLIP tokenizer.
            t5_states: of `t5_states`.
        """

    @abstractmethod
    def denoise(
        self, denoiser: nn.Module, noisy: Tensor, levels: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """The velocity (B, C, h, w) from the conditions of `prompt_states`."""

    def enable_text_encoder_training(self) -> None:
        self.train_text_encoder = True

    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Conditions of `prompt_states`; with trained text encoders CLIP's token ids and T5's states."""
        if not self.train_text_encoder:
            return super().encode_captions(captions)
        conditions = {}
        for number, name in enumerate(self.clip_tokenizers):
            output = getattr(self.pipe, name)(
                list(captions),
                padding="max_length",
                max_length=self.pipe.tokenizer_max_length,
                truncation=True,
                return_tensors="pt",
            )
            conditions[f"{IDS}_{number}"] = output.input_ids  # (B, length)
        with torch.no_grad():
            conditions[T5_STATES] = self.t5_states(list(captions))
        return conditions

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        if T5_STATES in conditions:
            token_ids = [conditions[f"{IDS}_{number}"] for number in range(len(self.clip_tokenizers))]
            conditions = self.states_with_clip(token_ids, conditions[T5_STATES])
        return self.denoise(denoiser, noisy, timesteps, conditions)
