"""Puts the digits base into the assets in half precision, then measures exactly what is shipped.

    python digits_evaluate.py --build BUILD --assets ../../diffadapt/assets --fonts FONTS

Metrics by the embedded classifier: the share of generated images in which it sees the requested class, and
the Frechet distance of its features from fresh printed digits. Writes figures.json and samples.png.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from digits_data import find_fonts, printed
from progress import replace_folder
from torch import Tensor
from torchvision.utils import save_image

from diffadapt.metrics.digit_classifier import class_agreement, load_digit_classifier
from diffadapt.metrics.frechet import fid
from diffadapt.models.sampling import ImageRequest, SamplingConfig, generate_all
from diffadapt.pipelines import ClassConditionalPipeline

CLASSES = 10
SIDE = 16
SAMPLES = 60  # images of samples.png
SAMPLES_GUIDANCE = 2.0


def place(build: Path, folder: Path) -> None:
    """Writes weights as float16; notes that lie beside them stay."""
    pipe = ClassConditionalPipeline.from_pretrained(build / "pipeline").to(torch.float16)
    notes = {path.name: path.read_bytes() for path in folder.glob("*.md")}
    replace_folder(folder, pipe.save_pretrained)
    for name, content in notes.items():
        (folder / name).write_bytes(content)
    for config in folder.rglob("*.json"):
        content = json.loads(config.read_text(encoding="utf-8"))
        content.pop("_name_or_path", None)
        if "dtype" in content:
            content["dtype"] = "float32"  # stock loaders compute in that
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def generate(
    pipe: ClassConditionalPipeline, count: int, steps: int, guidance: float
) -> tuple[Tensor, Tensor]:
    """`count` images, the classes in turn, seeds from 0, with their labels."""
    requests = [ImageRequest(str(n % CLASSES), n, n % CLASSES) for n in range(count)]
    config = SamplingConfig(num_inference_steps=steps, guidance_scale=guidance, batch_size=100)
    images = generate_all(pipe, requests, config)
    return images, torch.tensor([request.label for request in requests])


@torch.no_grad()
def measure(images: Tensor, labels: Tensor, real: Tensor) -> dict[str, float]:
    """Metrics of generated images (N, 3, H, W) in [0, 1] with their labels (N,)."""
    classifier = load_digit_classifier()
    generated_layers = classifier(images)
    real_layers = classifier(real)
    return {
        "class_agreement": class_agreement(generated_layers["logits"], labels),
        "frechet_distance": fid(real=real_layers["pool"], generated=generated_layers["pool"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, required=True, help="folder made by digits.py")
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--fonts", type=Path, nargs="*", default=[], help="as given to digits.py")
    parser.add_argument("--count", type=int, default=1000, help="images generated for each figure")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    folder = args.assets / "digits"
    place(args.build, folder)
    pipe = ClassConditionalPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    real_images, _ = printed(find_fonts(args.fonts), 2000, SIDE, seed=3)
    real = real_images.float() / 255
    figures = {
        "unet": json.loads((args.build / "unet.json").read_text(encoding="utf-8")),
        "count": args.count,
    }
    for guidance in (1.0, 2.0, 4.0):
        began = time.time()
        images, labels = generate(pipe, args.count, args.steps, guidance)
        seconds = (time.time() - began) / args.count
        figures[f"guidance_{guidance:g}"] = {**measure(images, labels, real), "seconds_per_picture": seconds}
        if guidance == SAMPLES_GUIDANCE:
            enlarged = images[:SAMPLES].repeat_interleave(3, 2).repeat_interleave(3, 3)
            save_image(enlarged, folder / "samples.png", nrow=CLASSES)
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
