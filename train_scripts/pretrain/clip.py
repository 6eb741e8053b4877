"""The image-and-text encoder `clip`: a small CLIPModel trained contrastively on the emoji.

    python train_scripts/pretrain/clip.py --build BUILD --steps 1400        # about 16 minutes on two cores

Captions against images, and (half as strong) one vendor's drawing against the other's.
A tenth of the emoji that both vendors draw is seen from one vendor only; the other drawing measures
retrieval. Continues from BUILD/clip.state; writes BUILD/clip (float32) and BUILD/clip.json (figures).
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from emoji_data import article
from progress import restore, save, set_rate
from scenes import Scenes, augment, composite
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from diffadapt.common.precision import fast_autocast


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """About 1.7 million parameters: text 3 layers, vision 4 layers of width 128 over 8 px patches."""
    width = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "projection_dim": 128}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    text |= {"num_hidden_layers": 3, "pad_token_id": tokenizer.pad_token_id, **ends, **width}
    vision = {"num_hidden_layers": 4, "image_size": 64, "patch_size": 8, **width}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def held_out(scenes: Scenes) -> set[int]:
    """One image of every tenth emoji that has two, the vendors by turns."""
    pairs = [i for i in range(1, len(scenes.concept)) if scenes.concept[i] == scenes.concept[i - 1]]
    return {second - (turn % 2) for turn, second in enumerate(pairs[::10])}


def batch(
    scenes: Scenes, pool: dict[int, list[int]], size: int, seed: int
) -> tuple[Tensor, list[str], Tensor]:
    """Images and captions of `size` different concepts, and another drawing of each."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    chosen = [rng.choice(pool[concept]) for concept in rng.sample(sorted(pool), size)]
    images, texts = zip(*(scenes.draw(index, rng) for index in chosen), strict=True)
    others = [composite(scenes.rgba[rng.choice(pool[scenes.concept[index]])]) for index in chosen]
    both = augment(torch.stack([*images, *others]), generator, zoom=0.2, gain=0.3)
    return both[:size], list(texts), both[size:]


def contrast(left: Tensor, right: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric contrastive loss of matching rows, and which of the left rows find their match."""
    logits = scale * F.normalize(left, dim=1) @ F.normalize(right, dim=1).T
    target = torch.arange(len(left))
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, logits.argmax(1) == target


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    return tokenizer(texts, padding=True, truncation=True, return_tensors="pt").input_ids


def train(model: CLIPModel, scenes: Scenes, tokenizer: CLIPTokenizer, args: argparse.Namespace) -> dict:
    model.train()
    optimizer = torch.optim.AdamW(
        [{"params": model.parameters(), "peak": args.lr}], betas=(0.9, 0.98), weight_decay=0.1
    )
    unseen, pool = held_out(scenes), {}
    for index, concept in enumerate(scenes.concept):
        if index not in unseen:
            pool.setdefault(concept, []).append(index)
    start, seconds = restore(args.build / "clip.state", model, optimizer)
    begun, right, figures = time.time() - seconds, [], {}
    for step in range(start, args.steps):
        set_rate(optimizer, step, args.steps)
        images, texts, others = batch(scenes, pool, args.batch, step)
        with fast_autocast(torch.device("cpu")), sdpa_kernel(SDPBackend.MATH):
            seen = model.get_image_features(pixel_values=torch.cat([images, others])).pooler_output
            read = model.get_text_features(input_ids=tokens(tokenizer, texts)).pooler_output
        seen, scale = seen.float(), model.logit_scale.exp()
        loss, hits = contrast(seen[: args.batch], read.float(), scale)
        loss = loss + 0.5 * contrast(seen[: args.batch], seen[args.batch :], scale)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad()
        model.logit_scale.data.clamp_(max=4.6)
        right.append(hits.float().mean().item())
        accuracy = sum(right[-50:]) / len(right[-50:])
        figures = {"steps": step + 1, "loss": loss.item(), "in_batch_accuracy": accuracy}
        figures["seconds"] = time.time() - begun
        if (step + 1) % 25 == 0:
            print(json.dumps({key: round(value, 4) for key, value in figures.items()}), flush=True)
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            save(args.build / "clip.state", model, optimizer, step + 1, figures["seconds"])
    return figures


@torch.no_grad()
def retrieval(model: CLIPModel, scenes: Scenes, tokenizer: CLIPTokenizer) -> dict[str, float]:
    """How often a held-out drawing finds its emoji among all: by name, and by the other vendor's drawing."""
    model.eval()
    unseen = sorted(held_out(scenes))
    pixels = composite(scenes.rgba)
    parts = [model.get_image_features(pixel_values=part).pooler_output for part in pixels.split(256)]
    names = [article(f"a {row['names'][0]} emoji") for row in scenes.concepts]
    texts = model.get_text_features(input_ids=tokens(tokenizer, names)).pooler_output
    images, texts = F.normalize(torch.cat(parts), dim=1), F.normalize(texts, dim=1)
    concept = torch.tensor(scenes.concept)
    by_name = (images[unseen] @ texts.T).topk(5).indices == concept[unseen, None]
    alike = images[unseen] @ images.T
    alike[torch.arange(len(unseen)), unseen] = -2  # not itself
    by_image = concept[alike.topk(5).indices] == concept[unseen, None]
    found = {"held_out": len(unseen)}
    for kind, hits in (("name", by_name), ("image", by_image)):
        found[f"{kind}_top1"], found[f"{kind}_top5"] = (
            hits[:, :k].any(1).float().mean().item() for k in (1, 5)
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, required=True, help="made by emoji_data.py and tokenizer.py")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch", type=int, default=128, help="concepts per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(args.build / "tokenizer")
    scenes, model = Scenes(args.build), build_model(tokenizer)
    figures = train(model, scenes, tokenizer, args) | retrieval(model, scenes, tokenizer)
    figures["parameters"] = sum(p.numel() for p in model.parameters())
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    model.save_pretrained(args.build / "clip")
    tokenizer.save_pretrained(args.build / "clip")
    CLIPImageProcessor(**half, **size).save_pretrained(args.build / "clip")
    (args.build / "clip.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
