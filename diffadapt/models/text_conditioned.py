"""Words on their way to the denoiser: token ids, and the states of CLIP text encoders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from diffadapt.models.latent_base import LatentBase

IDS, MASK, EMPTY = "input_ids", "attention_mask", "is_empty"  # names of token ids among the conditions
TOKENIZERS = ("tokenizer", "tokenizer_2")  # of a pipeline


@dataclass(frozen=True)
class TruncatedCaption:
    """A caption that is longer than a tokenizer takes."""

    caption: str
    length: int  # tokens it has
    limit: int  # tokens that are read
    lost: str  # the words that are not read


@dataclass
class TextConditionedBase(LatentBase, ABC):
    """A base that is told captions. Its text encoders are asked once, or, when they are trained, in every
    step: then what is kept of a caption are its token ids."""

    train_text_encoder: bool = False

    empty_caption = ""  # what a dropped caption becomes

    @property
    @abstractmethod
    def tokenizers(self) -> list[PreTrainedTokenizerBase]:
        """One for each text encoder."""

    @abstractmethod
    def text_states(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the text encoders make of token ids, named as the denoiser takes them."""

    @abstractmethod
    def ask(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, told: dict[str, Tensor]) -> Tensor:
        """The denoiser's output at its own precision, from text states and sizes."""

    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Text states, or token ids when the text encoders are trained; each (B, ...)."""
        tokens = self.tokens(captions)
        if self.train_text_encoder:
            return tokens
        with torch.no_grad():
            return {name: states.float() for name, states in self.text_states(tokens).items()}

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """The denoiser's output (B, C, h, w). Token ids among the conditions are encoded here, so that
        gradients reach the text encoders."""
        told = {name: value for name, value in conditions.items() if not name.startswith((IDS, MASK, EMPTY))}
        if IDS in conditions:
            told |= self.text_states(conditions)
        return self.ask(denoiser, noisy, timesteps, told)

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Token ids (B, length) of each text encoder, and masks for those that use them."""
        tokens = {}
        for number, tokenizer in enumerate(self.tokenizers):
            suffix = f"_{number + 1}" if number else ""
            found = tokenizer(
                list(captions),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            tokens[IDS + suffix] = found.input_ids
            tokens[MASK + suffix] = found.attention_mask
        return tokens

    def truncated_captions(self, captions: Sequence[str]) -> list[TruncatedCaption]:
        """The distinct captions of which the end is not read, and what is lost of each."""
        found = [truncated_caption(tok, text) for text in dict.fromkeys(captions) for tok in self.tokenizers]
        return list(dict.fromkeys(cut for cut in found if cut is not None))


def truncated_prompts(pipe: DiffusionPipeline, prompts: Sequence[str]) -> list[TruncatedCaption]:
    """The distinct prompts of which a pipeline does not read the end; none where it has no tokenizers."""
    tokenizers = [getattr(pipe, name, None) for name in TOKENIZERS]
    cuts = [
        truncated_caption(tokenizer, prompt)
        for prompt in dict.fromkeys(prompts)
        for tokenizer in tokenizers
        if tokenizer is not None
    ]
    return list(dict.fromkeys(cut for cut in cuts if cut is not None))


def truncated_caption(tokenizer: PreTrainedTokenizerBase, caption: str) -> TruncatedCaption | None:
    """What a tokenizer cuts off; None when the whole caption fits."""
    ids = tokenizer(caption, add_special_tokens=False, verbose=False).input_ids
    room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
    if len(ids) <= room:
        return None
    return TruncatedCaption(caption, len(ids), room, tokenizer.decode(ids[room:]).strip())
