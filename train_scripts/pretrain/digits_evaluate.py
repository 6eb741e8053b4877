"""Put the digits base in its place as half precision, then measure exactly what is shipped.

    python digits_evaluate.py --build BUILD --assets ../../diffadapt/assets --fonts FONTS

Figures by the embedded classifier: the share of drawn pictures in which it sees the class that was asked for,
and the Frechet distance of its features from fresh printed digits. Writes figures.json and samples.png.
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

CLASSES, SIDE = 10, 16


def place(build: Path, folder: Path) -> None:
    """Weights as float16 on disk; notes that lie beside them stay."""
    pipe = ClassConditionalPipeline.from_pretrained(build / "pipeline").to(torch.float16)
    kept = {path.name: path.read_bytes() for path in folder.glob("*.md")}
    replace_folder(folder, pipe.save_pretrained)
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    for config in folder.rglob("*.json"):
        content = json.loads(config.read_text(encoding="utf-8"))
        content.pop("_name_or_path", None)
        if "dtype" in content:
            content["dtype"] = "float32"  # stock loaders compute in that
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def pictures(
    pipe: ClassConditionalPipeline, count: int, steps: int, guidance: float
) -> tuple[Tensor, Tensor]:
    """`count` pictures, the classes in turn, seeds from 0, with their labels."""
    shots = [ImageRequest(str(n % CLASSES), n, n % CLASSES) for n in range(count)]
    made = generate_all(
        pipe, shots, SamplingConfig(num_inference_steps=steps, guidance_scale=guidance, batch_size=100)
    )
    return made, torch.tensor([shot.label for shot in shots])


@torch.no_grad()
def measure(made: Tensor, labels: Tensor, real: Tensor) -> dict[str, float]:
    classifier = load_digit_classifier()
    drawn, reference = classifier(made), classifier(real)
    return {
        "class_agreement": class_agreement(drawn["logits"], labels),
        "frechet_distance": fid(real=reference["pool"], generated=drawn["pool"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, required=True, help="folder made by digits.py")
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--fonts", type=Path, nargs="*", default=[], help="as given to digits.py")
    parser.add_argument("--count", type=int, default=1000, help="pictures drawn for each figure")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    folder = args.assets / "digits"
    place(args.build, folder)
    pipe = ClassConditionalPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    real = printed(find_fonts(args.fonts), 2000, SIDE, seed=3)[0].float() / 255
    figures = {
        "unet": json.loads((args.build / "unet.json").read_text(encoding="utf-8")),
        "count": args.count,
    }
    for guidance in (1.0, 2.0, 4.0):
        started = time.time()
        made, labels = pictures(pipe, args.count, args.steps, guidance)
        seconds = (time.time() - started) / args.count
        figures[f"guidance_{guidance:g}"] = {**measure(made, labels, real), "seconds_per_picture": seconds}
        if guidance == 2.0:
            enlarged = made[:60].repeat_interleave(3, 2).repeat_interleave(3, 3)
            save_image(enlarged, folder / "samples.png", nrow=CLASSES)
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
