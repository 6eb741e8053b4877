"""Features of images and texts: unit vectors of a CLIP model (arXiv 2103.00020)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from diffadapt.metrics.resize import shorter_side_then_middle
from diffadapt.models.base_names import resolve


@dataclass(frozen=True)
class ClipFeatures:
    """Image and text features of one CLIP model; scores carry its name."""

    name: str
    model: CLIPModel
    tokenizer: CLIPTokenizer
    processor: CLIPImageProcessor

    def images(self, batches: Iterable[Tensor]) -> Tensor:
        """Batches (B, 3, H, W) in [0, 1] -> (N, D) unit vectors, float32."""
        side = self.model.config.vision_config.image_size
        features = []
        for batch in batches:
            if batch.shape[-2:] != (side, side):  # as CLIP's own processor does
                batch = shorter_side_then_middle(255 * batch, side, side) / 255
            features.append(self.encode(batch))
        return torch.cat(features)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1], S the side that the model takes -> (B, D) unit vectors, float32."""
        return normalize(self.embed(pixels), dim=-1)

    @torch.no_grad()
    def embed(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] -> (B, D) embeddings of the model, not normalised."""
        mean = torch.tensor(self.processor.image_mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.processor.image_std, device=pixels.device).view(3, 1, 1)
        pixels = ((pixels - mean) / std).to(self.model.device)
        hidden = self.model.vision_model(pixel_values=pixels).pooler_output
        return self.model.visual_projection(hidden).float()

    @property
    def text_length(self) -> int:
        """Tokens that the text encoder reads; of a longer text the rest is cut off."""
        return self.model.config.text_config.max_position_embeddings

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, with those of its beginning and end, before truncation."""
        token_ids = self.tokenizer(list(texts), truncation=False).input_ids
        return [len(ids) for ids in token_ids]

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """N texts -> (N, D) unit vectors, float32."""
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.text_length,
            truncation=True,
            return_tensors="pt",
        )
        # no mask: attention is causal, so the padding cannot change the end token before it, which is pooled
        states = self.model.text_model(input_ids=tokens.input_ids.to(self.model.device), attention_mask=None)
        return normalize(self.model.text_projection(states.pooler_output).float(), dim=-1)


def load_clip(name: str) -> ClipFeatures:
    """A CLIP model from a folder, hub name or `embedded:clip`, frozen, in float32."""
    path = resolve(name)
    model = CLIPModel.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    model.requires_grad_(False).eval()
    tokenizer = CLIPTokenizer.from_pretrained(path)
    processor = CLIPImageProcessor.from_pretrained(path)
    return ClipFeatures(name, model, tokenizer, processor)
