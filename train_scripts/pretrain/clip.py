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
from progress import restore, save, set_learning_rate
from scenes import Scenes, augment, composite
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from diffadapt.common.precision import fast_autocast

ACCURACY_WINDOW = 50  # steps over which the printed accuracy is averaged
MAX_LOGIT_SCALE = 4.6  # logarithm; 100, as in CLIP


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """About 1.7 million parameters: text 3 layers, vision 4 layers of width 128 over 8 px patches."""
    width = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "projection_dim": 128}
    text_config = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "num_hidden_layers": 3,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **width,
    }
    vision_config = {"num_hidden_layers": 4, "image_size": 64, "patch_size": 8, **width}
    return CLIPModel(CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=128))


def held_out_images(scenes: Scenes) -> set[int]:
    """One image of every tenth emoji that has two, the vendors by turns."""
    second_images = []  # of emoji that have two, which follow each other
    for index in range(1, len(scenes.concept)):
        if scenes.concept[index] == scenes.concept[index - 1]:
            second_images.append(index)
    held_out = set()
    for turn, second in enumerate(second_images[::10]):
        held_out.add(second - turn % 2)  # the second image, the first one of the next emoji, ...
    return held_out


def random_batch(
    scenes: Scenes, images_of: dict[int, list[int]], size: int, seed: int
) -> tuple[Tensor, list[str], Tensor]:
    """Images (B, 3, 64, 64) and captions of `size` different concepts, and another drawing of each.

    Args:
        images_of: concept -> its training images.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    # different concepts: an emoji that appears twice would be a false negative of itself
    indices = []
    for concept in rng.sample(sorted(images_of), size):
        indices.append(rng.choice(images_of[concept]))
    images = []
    texts = []
    for index in indices:
        image, text = scenes.draw(index, rng)
        images.append(image)
        texts.append(text)
    for index in indices:
        other = rng.choice(images_of[scenes.concept[index]])
        images.append(composite(scenes.rgba[other]))
    augmented = augment(torch.stack(images), generator, zoom=0.2, gain=0.3)
    return augmented[:size], texts, augmented[size:]


def contrastive_loss(first: Tensor, second: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric contrastive loss of matching rows of (B, D) features (CLIP, arXiv 2103.00020, figure 3).

    Returns:
        The loss, and which of the first rows find their match, (B,).
    """
    logits = scale * F.normalize(first, dim=1) @ F.normalize(second, dim=1).T  # (B, B)
    target = torch.arange(len(first))  # row i belongs to column i
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, logits.argmax(1) == target


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """(B, L) token ids."""
    return tokenizer(texts, padding=True, truncation=True, return_tensors="pt").input_ids


def train(model: CLIPModel, scenes: Scenes, tokenizer: CLIPTokenizer, args: argparse.Namespace) -> dict:
    """Trains to `--steps` and returns the last step's figures."""
    model.train()
    optimizer = torch.optim.AdamW(
        [{"params": model.parameters(), "peak": args.lr}], betas=(0.9, 0.98), weight_decay=0.1
    )
    held_out = held_out_images(scenes)
    images_of: dict[int, list[int]] = {}
    for index, concept in enumerate(scenes.concept):
        if index not in held_out:
            images_of.setdefault(concept, []).append(index)
    start, seconds = restore(args.build / "clip.state", model, optimizer)
    began = time.time() - seconds
    accuracies: list[float] = []
    figures: dict = {}
    for step in range(start, args.steps):
        set_learning_rate(optimizer, step, args.steps)
        images, texts, other_drawings = random_batch(scenes, images_of, args.batch, step)
        with fast_autocast(torch.device("cpu")), sdpa_kernel(SDPBackend.MATH):
            all_images = torch.cat([images, other_drawings])  # (2 B, 3, 64, 64)
            image_features = model.get_image_features(pixel_values=all_images).pooler_output
            text_features = model.get_text_features(input_ids=tokenize(tokenizer, texts)).pooler_output
        image_features = image_features.float()  # (2 B, D)
        scale = model.logit_scale.exp()
        text_loss, hits = contrastive_loss(image_features[: args.batch], text_features.float(), scale)
        vendor_loss, _ = contrastive_loss(image_features[: args.batch], image_features[args.batch :], scale)
        loss = text_loss + 0.5 * vendor_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)
        accuracies = [*accuracies[-ACCURACY_WINDOW + 1 :], hits.float().mean().item()]
        figures = {
            "steps": step + 1,
            "loss": loss.item(),
            "in_batch_accuracy": sum(accuracies) / len(accuracies),
            "seconds": time.time() - began,
        }
        if (step + 1) % 25 == 0:
            print(json.dumps({key: round(value, 4) for key, value in figures.items()}), flush=True)
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            save(args.build / "clip.state", model, optimizer, step + 1, figures["seconds"])
    return figures


@torch.no_grad()
def retrieval(model: CLIPModel, scenes: Scenes, tokenizer: CLIPTokenizer) -> dict[str, float]:
    """The share of held-out drawings that find their emoji among all: by name, and by the other drawing."""
    model.eval()
    held_out = sorted(held_out_images(scenes))
    pixels = composite(scenes.rgba)
    parts = [model.get_image_features(pixel_values=part).pooler_output for part in pixels.split(256)]
    images = F.normalize(torch.cat(parts), dim=1)  # (N, D)
    names = [article(f"a {row['names'][0]} emoji") for row in scenes.concepts]
    text_features = model.get_text_features(input_ids=tokenize(tokenizer, names)).pooler_output
    texts = F.normalize(text_features, dim=1)  # (concepts, D)
    concept = torch.tensor(scenes.concept)
    targets = concept[held_out, None]
    hits_by_name = (images[held_out] @ texts.T).topk(5).indices == targets
    similarity = images[held_out] @ images.T
    similarity[torch.arange(len(held_out)), held_out] = -2  # not itself
    hits_by_image = concept[similarity.topk(5).indices] == targets
    shares = {"held_out": len(held_out)}
    for kind, hits in (("name", hits_by_name), ("image", hits_by_image)):
        for k in (1, 5):
            shares[f"{kind}_top{k}"] = hits[:, :k].any(1).float().mean().item()
    return shares


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
    scenes = Scenes(args.build)
    model = build_model(tokenizer)
    figures = train(model, scenes, tokenizer, args)
    figures |= retrieval(model, scenes, tokenizer)
    figures["parameters"] = sum(p.numel() for p in model.parameters())
    processor = CLIPImageProcessor(
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
    )
    for part in (model, tokenizer, processor):
        part.save_pretrained(args.build / "clip")
    (args.build / "clip.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
