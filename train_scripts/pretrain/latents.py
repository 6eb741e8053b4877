"""All scenes as latents and tokens, made once for unet.py, and random batches of them."""

import random

import torch
from diffusers import AutoencoderTiny
from scenes import KINDS, SHARES, Scenes
from torch import Tensor
from transformers import CLIPTokenizer

COPIES = {"plain": 1, "ground": 3, "pair": 3}  # scenes of each kind per emoji
CAPTIONS_OF_PLAIN = 16  # captions of each plain image
EMPTY_SHARE = 0.1  # of samples, without words, for classifier-free guidance

EncodedScenes = dict[str, tuple[Tensor, Tensor]]  # kind of scene -> latents (N, C, h, w), tokens (M, L)


@torch.no_grad()
def encode_scenes(scenes: Scenes, vae: AutoencoderTiny, tokenizer: CLIPTokenizer) -> EncodedScenes:
    """The latents and tokens of each kind of scene; plain images appear with 16 captions each."""
    rng = random.Random(0)
    count = len(scenes.concept)
    encoded = {}
    for kind in KINDS:
        images = []
        texts = []
        for index in list(range(count)) * COPIES[kind]:
            image, text = scenes.draw(index, rng, kind=kind)
            images.append(image)
            texts.append(text)
        latents = torch.cat([vae.encode(part).latents for part in torch.stack(images).split(128)])
        if kind == "plain":
            texts = [scenes.caption(index, rng) for index in list(range(count)) * CAPTIONS_OF_PLAIN]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        encoded[kind] = (latents, tokens)
    return encoded


def random_batch(
    encoded: EncodedScenes, empty_tokens: Tensor, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Latents (B, C, h, w) and tokens (B, L) of random scenes, some of them without words."""
    shares = torch.tensor(SHARES, dtype=torch.float)
    kinds = torch.multinomial(shares, size, replacement=True, generator=generator)
    counts = kinds.bincount(minlength=len(KINDS)).tolist()
    latents = []
    tokens = []
    for kind, count in zip(KINDS, counts, strict=True):
        kind_latents, kind_tokens = encoded[kind]
        rows = torch.randint(len(kind_tokens), (count,), generator=generator)
        # captions are stored round by round over the images, so row modulo their number is the image
        latents.append(kind_latents[rows % len(kind_latents)])
        tokens.append(kind_tokens[rows])
    is_empty = torch.rand(size, 1, generator=generator) < EMPTY_SHARE
    return torch.cat(latents), torch.where(is_empty, empty_tokens, torch.cat(tokens))
