"""The classifier of digits behind `embedded:digits`, trained on printed and handwritten ones alike.

    python digits_classifier.py --assets ../../diffadapt/assets --fonts FONTS      # two minutes on two cores

Half of each batch is printed, half handwritten, turned, scaled and shifted a little. Writes
digit-classifier/ (float16) with figures.json: accuracies on images it never saw.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from digits_data import Labelled, find_fonts, handwritten, printed
from safetensors.torch import save_file
from torch import Tensor

from diffadapt.metrics.digit_classifier import DigitClassifier, load_digit_classifier

SIDE = 16
MAX_ANGLE = 0.21  # radians, 12 degrees
MAX_ZOOM = 0.12
MAX_SHIFT = 1.0  # pixels
NOISE = 0.05  # standard deviation


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] turned, scaled and shifted at random, with noise."""

    def uniform(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=generator) - 0.5) * 2

    count = len(pixels)
    angle = uniform(count) * MAX_ANGLE
    scale = uniform(count) * MAX_ZOOM
    shift = uniform(count, 2) * 2 * MAX_SHIFT / SIDE  # in units of half the image
    cos = angle.cos() * (1 + scale)
    sin = angle.sin() * (1 + scale)
    first_row = torch.stack([cos, -sin, shift[:, 0]], 1)
    second_row = torch.stack([sin, cos, shift[:, 1]], 1)
    theta = torch.stack([first_row, second_row], 1)  # (B, 2, 3) affine maps
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return (moved + NOISE * torch.randn(moved.shape, generator=generator)).clamp(0, 1)


def random_batch(sets: list[Labelled], size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Equally many images of each set, (B, 3, H, W) in [0, 1], and their labels."""
    pixels = []
    labels = []
    for set_images, set_labels in sets:
        rows = torch.randint(len(set_images), (size // len(sets),), generator=generator)
        pixels.append(set_images[rows])
        labels.append(set_labels[rows])
    return augment(torch.cat(pixels).float() / 255, generator), torch.cat(labels)


def train(classifier: DigitClassifier, sets: list[Labelled], args: argparse.Namespace) -> None:
    """Trains for `--steps` on all sets alike."""
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=args.lr, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)
    for step in range(args.steps):
        pixels, labels = random_batch(sets, args.batch, torch.Generator().manual_seed(step))
        loss = F.cross_entropy(classifier(pixels)["logits"], labels, label_smoothing=0.05)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(json.dumps({"step": step + 1, "loss": round(loss.item(), 4)}), flush=True)


@torch.no_grad()
def accuracy(classifier: DigitClassifier, data: Labelled) -> float:
    """The share of images whose digit is recognised."""
    images, labels = data
    predicted = classifier(images.float() / 255)["logits"].argmax(1)
    return float((predicted == labels).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--fonts", type=Path, nargs="*", default=[], help="more fonts than matplotlib's")
    parser.add_argument("--count", type=int, default=20_000, help="printed digits to render")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    began = time.time()
    fonts = find_fonts(args.fonts)
    handwriting = handwritten(SIDE)
    classifier = DigitClassifier(side=SIDE)
    train(classifier, [printed(fonts, args.count, SIDE, seed=1), handwriting["train"]], args)
    folder = args.assets / "digit-classifier"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in classifier.state_dict().items():
        tensors[name] = tensor.half() if tensor.is_floating_point() else tensor
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(classifier.config) + "\n", encoding="utf-8")
    stored = load_digit_classifier(folder)  # the figures are of what is shipped
    figures = {
        "handwriting_held_out": accuracy(stored, handwriting["held_out"]),
        "printed_unseen": accuracy(stored, printed(fonts, 2000, SIDE, seed=2)),
        "parameters": sum(p.numel() for p in stored.parameters()),
        "steps": args.steps,
        "batch": args.batch,
        "seconds": time.time() - began,
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
