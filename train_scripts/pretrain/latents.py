"""All scenes as latents and tokens, made once for unet.py, and random batches of them."""

import random

import torch
from diffusers import AutoencoderTiny
from scenes import KINDS, SHARES, Scenes
from torch import Tensor
from transformers import CLIPTokenizer

Ready = dict[str, tuple[Tensor, Tensor]]  # of each kind of scene the latents and the tokens


@torch.no_grad()
def prepare(scenes: Scenes, vae: AutoencoderTiny, tokenizer: CLIPTokenizer) -> Ready:
    """For each kind of scene its latents and tokens; plain images appear with 16 captions each."""
    ready, rng, count = {}, random.Random(0), len(scenes.concept)
    for kind, copies in zip(KINDS, (1, 3, 3), strict=True):
        drawn = [scenes.draw(index, rng, kind=kind) for index in list(range(count)) * copies]
        images, texts = torch.stack([image for image, _ in drawn]), [text for _, text in drawn]
        latents = torch.cat([vae.encode(part).latents for part in images.split(128)])
        if kind == "plain":
            texts = [scenes.caption(index, rng) for _ in range(16) for index in range(count)]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        ready[kind] = latents, ids
    return ready


def batch(ready: Ready, empty: Tensor, size: int, generator: torch.Generator) -> tuple:
    """Latents and tokens of random scenes; a tenth without words, for classifier-free guidance."""
    shares = torch.tensor(SHARES, dtype=torch.float)
    kinds = torch.multinomial(shares, size, replacement=True, generator=generator).bincount(
        minlength=len(KINDS)
    )
    latents, ids = [], []
    for kind, count in zip(KINDS, kinds.tolist(), strict=True):
        rows = torch.randint(len(ready[kind][1]), (count,), generator=generator)
        latents.append(ready[kind][0][rows % len(ready[kind][0])])
        ids.append(ready[kind][1][rows])
    wordless = torch.rand(size, 1, generator=generator) < 0.1
    return torch.cat(latents), torch.where(wordless, empty, torch.cat(ids))
