"""Puts the trained models into the assets in half precision, then measures exactly what is shipped.

    python train_scripts/pretrain/evaluate.py --build BUILD --assets diffadapt/assets

Writes assets/emoji and assets/clip. Of 200 training captions: the share whose image has its own emoji among
the nearest five (and as the nearest one) of all real images, in the features of clip; `figures.json` and
`samples.webp` beside the model hold the result. With `--count 0` it only puts the models in place.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from emoji_data import article
from progress import replace_folder
from scenes import Scenes, composite
from torch import Tensor
from torchvision.transforms.functional import to_tensor
from torchvision.utils import save_image
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

EMOJI = """pizza,cat face,dog,red apple,ghost,blue heart,rocket,house,soccer,tulip,snowman,banana,robot face,
bicycle,hamburger,crab,penguin,gift,guitar,grinning,sob,skull,full moon,fish"""  # on samples.webp
BATCH_SIZE = 50  # images generated at once


def place(build: Path, assets: Path) -> None:
    """Writes weights as float16; the configurations say float32, so that stock loaders compute in that."""
    pipe = StableDiffusionPipeline.from_pretrained(build / "pipeline", safety_checker=None).to(torch.float16)
    clip = CLIPModel.from_pretrained(build / "clip").to(torch.float16)

    def write_clip(folder: str) -> None:
        clip.save_pretrained(folder)
        CLIPTokenizer.from_pretrained(build / "clip").save_pretrained(folder)
        CLIPImageProcessor.from_pretrained(build / "clip").save_pretrained(folder)

    for name, write in (("emoji", pipe.save_pretrained), ("clip", write_clip)):
        notes = {path.name: path.read_bytes() for path in (assets / name).glob("*") if is_note(path)}
        replace_folder(assets / name, write)
        for file, content in notes.items():
            (assets / name / file).write_bytes(content)
    for tokenizer in (assets / "emoji/tokenizer", assets / "clip"):
        for file in ("vocab.json", "merges.txt"):  # for programs that do not read tokenizer.json
            (tokenizer / file).write_bytes((build / "tokenizer" / file).read_bytes())
    for config in (*assets.glob("emoji/**/*.json"), *assets.glob("clip/*.json")):
        clean_config(config)


def clean_config(path: Path) -> None:
    """Stored as float16 but opened as float32; no folder names; nothing a stock loader would warn about."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if path.parent.name == "vae":
        content.pop("block_out_channels", None)  # AutoencoderTiny adds it by itself
    content.pop("_name_or_path", None)
    if "dtype" in content:
        content["dtype"] = "float32"
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def is_note(path: Path) -> bool:
    """Whether a file stays when the weights are replaced: the card, the licences and the figures."""
    return path.suffix in (".md", ".png", ".webp", ".txt") or path.name in ("LICENSE", "figures.json")


@torch.no_grad()
def features(clip: CLIPModel, images: Tensor) -> Tensor:
    """Unit features of images (N, 3, 64, 64) in [-1, 1], (N, D)."""
    parts = [clip.get_image_features(pixel_values=part).pooler_output for part in images.split(256)]
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)


def generate(pipe: StableDiffusionPipeline, texts: list[str], steps: int, guidance: float) -> Tensor:
    """One image and one seed per text: (N, 3, 64, 64) in [-1, 1]."""
    images = []
    for start in range(0, len(texts), BATCH_SIZE):
        prompts = texts[start : start + BATCH_SIZE]
        seeds = [torch.Generator().manual_seed(start + offset) for offset in range(len(prompts))]
        images += pipe(prompts, generator=seeds, num_inference_steps=steps, guidance_scale=guidance).images
    return torch.stack([to_tensor(image) * 2 - 1 for image in images])


def measure(pipe: StableDiffusionPipeline, clip: CLIPModel, scenes: Scenes, args: argparse.Namespace) -> dict:
    """Retrieval of the emoji and the style of random training captions, and the time per image."""
    rng = random.Random(args.seed)
    indices = rng.sample(range(len(scenes.concept)), args.count)  # of the images whose captions are taken
    texts = [scenes.caption(index, rng) for index in indices]
    began = time.time()
    images = generate(pipe, texts, args.steps, args.guidance)
    seconds = (time.time() - began) / args.count
    concept = torch.tensor(scenes.concept)
    style = torch.tensor(scenes.style)
    similarity = features(clip, images) @ features(clip, composite(scenes.rgba)).T  # (count, N)
    nearest = similarity.topk(5).indices  # (count, 5)
    has_concept = concept[nearest] == concept[indices, None]  # (count, 5)
    styled_rows = []  # captions that name a style
    styled_indices = []
    for row, text in enumerate(texts):
        if text.endswith("style"):
            styled_rows.append(row)
            styled_indices.append(indices[row])
    has_style = style[nearest[styled_rows, 0]] == style[styled_indices]
    figures = {
        "captions": args.count,
        "steps": args.steps,
        "guidance_scale": args.guidance,
        "seed": args.seed,
    }
    for k in (1, 5):
        figures[f"top{k}"] = round(has_concept[:, :k].any(1).float().mean().item(), 3)
    figures["style_named"] = round(has_style.float().mean().item(), 3)
    figures["seconds_per_image"] = round(seconds, 3)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200, help="training captions to generate images of")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=1, help="chooses the captions")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    place(args.build, args.assets)
    if args.count == 0:
        return
    emoji = args.assets / "emoji"
    pipe = StableDiffusionPipeline.from_pretrained(emoji)
    pipe.set_progress_bar_config(disable=True)
    clip = CLIPModel.from_pretrained(args.assets / "clip").eval()
    prompts = [article(f"a {name.strip()} emoji") for name in EMOJI.split(",")]
    samples = generate(pipe, prompts, args.steps, args.guidance) / 2 + 0.5
    save_image(samples, emoji / "samples.webp", nrow=8)
    figures = {"sampling": measure(pipe, clip, Scenes(args.build), args)}
    for part in ("vae", "unet"):
        figures[part] = json.loads((args.build / f"{part}.json").read_text(encoding="utf-8"))
    (emoji / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    clip_figures = (args.build / "clip.json").read_text(encoding="utf-8")
    (args.assets / "clip/figures.json").write_text(clip_figures + "\n", encoding="utf-8")
    print(json.dumps(figures["sampling"]))


if __name__ == "__main__":
    main()
