"""The classifier of digits behind `embedded:digits`, trained on printed and handwritten ones alike.

    python digits_classifier.py --assets ../../diffadapt/assets --fonts FONTS      # two minutes on two cores

Half of each batch is printed, half handwritten, turned, scaled and shifted a little. Writes
digit-classifier/ (float16) with figures.json: accuracies on pictures it never saw.
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


def varied(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures turned by up to 12 degrees, scaled by up to 12 % and shifted by up to a pixel, with noise."""
    count = len(pixels)
    angle, scale = ((torch.rand(count, generator=generator) - 0.5) * 2 * span for span in (0.21, 0.12))
    shift = (torch.rand(count, 2, generator=generator) - 0.5) * 2 * 2 / SIDE
    cos, sin = angle.cos() * (1 + scale), angle.sin() * (1 + scale)
    rows = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    places = F.affine_grid(rows, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, places, padding_mode="border", align_corners=False)
    return (moved + 0.05 * torch.randn(moved.shape, generator=generator)).clamp(0, 1)


def batch(parts: list[Labelled], size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Equally many of each part, in [0, 1]."""
    rows = [torch.randint(len(images), (size // len(parts),), generator=generator) for images, _ in parts]
    pixels = torch.cat([images[some] for (images, _), some in zip(parts, rows, strict=True)]).float() / 255
    labels = torch.cat([labels[some] for (_, labels), some in zip(parts, rows, strict=True)])
    return varied(pixels, generator), labels


def train(classifier: DigitClassifier, parts: list[Labelled], args: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=args.lr, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)
    for step in range(args.steps):
        pixels, labels = batch(parts, args.batch, torch.Generator().manual_seed(step))
        loss = F.cross_entropy(classifier(pixels)["logits"], labels, label_smoothing=0.05)
        loss.backward()
        optimizer.step(), optimizer.zero_grad(), schedule.step()
        if (step + 1) % 100 == 0:
            print(json.dumps({"step": step + 1, "loss": round(loss.item(), 4)}), flush=True)


@torch.no_grad()
def accuracy(classifier: DigitClassifier, data: Labelled) -> float:
    seen = classifier(data[0].float() / 255)["logits"].argmax(1)
    return float((seen == data[1]).double().mean())


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
    started, fonts, real = time.time(), find_fonts(args.fonts), handwritten(SIDE)
    classifier = DigitClassifier(side=SIDE)
    train(classifier, [printed(fonts, args.count, SIDE, seed=1), real["train"]], args)
    folder = args.assets / "digit-classifier"
    folder.mkdir(parents=True, exist_ok=True)
    half = {n: t.half() if t.is_floating_point() else t for n, t in classifier.state_dict().items()}
    save_file(half, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(classifier.config) + "\n", encoding="utf-8")
    stored = load_digit_classifier(folder)  # the figures are of what is shipped
    figures = {
        "handwriting_held_out": accuracy(stored, real["held_out"]),
        "printed_unseen": accuracy(stored, printed(fonts, 2000, SIDE, seed=2)),
        "parameters": sum(p.numel() for p in stored.parameters()),
        "steps": args.steps,
        "batch": args.batch,
        "seconds": time.time() - started,
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
