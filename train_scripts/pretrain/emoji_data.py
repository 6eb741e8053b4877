"""Images and captions of the embedded base, from two public npm packages of 64 px emoji.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0       # unpack both with tar -xzf
    python train_scripts/pretrain/emoji_data.py --google GOOGLE --twitter TWITTER --build BUILD

Noto Emoji (Apache-2.0) and Twemoji (CC-BY 4.0). People, symbols (with the CJK squares), flags and components
are left out, and so are the nine cat faces and the three wise monkeys of every vendor: they are the new
subjects that fine-tuning is tried on. Writes BUILD/images.safetensors and BUILD/concepts.json.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

CATEGORIES = (
    "Smileys & Emotion",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
)
CATS = tuple(f"{code:x}" for code in range(0x1F638, 0x1F641))
MONKEYS = tuple(f"{code:x}" for code in range(0x1F648, 0x1F64B))
VENDORS = ("google", "twitter")
STYLES = ("noto", "twemoji")  # of the vendors, in this order
TEMPLATES = ("a {} emoji", "a {} emoji", "an emoji of a {}", "a {}", "{} emoji", "{}")
STYLED_TEMPLATES = ("a {} emoji in {} style", "{} emoji in {} style", "a {} in {} style")


def phrases(row: dict) -> list[str]:
    """The ways to name an emoji: its short names first, then its Unicode name."""
    names = [re.sub(r"(?<=[a-z])2$", "", name) for name in row["short_names"]]
    names.append(row["name"])
    spoken = [re.sub(r"[_\s]+", " ", name.replace("-", " ")).strip().lower() for name in names]
    return list(dict.fromkeys(spoken))


def article(text: str) -> str:
    """`a apple` becomes `an apple`."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def captions(names: list[str], style: str) -> list[str]:
    """Every training caption of one image."""
    texts = []
    for name in names:
        for template in TEMPLATES:
            texts.append(article(template.format(name)))
    for name in names:
        for template in STYLED_TEMPLATES:
            texts.append(article(template.format(name, style)))
    return texts


def select(rows: list[dict]) -> list[dict]:
    """The emoji of the base, in Unicode's order, without the held-out subjects."""
    selected = []
    for row in rows:
        is_held_out = row["unified"].lower() in CATS + MONKEYS
        if row["category"] in CATEGORIES and not is_held_out:
            selected.append(row)
    return sorted(selected, key=lambda row: row["sort_order"])


def load(build: Path) -> tuple[Tensor, Tensor, Tensor, list[dict]]:
    """RGBA images (N, 64, 64, 4), the concept and the style of each (N,), and the concepts."""
    data = load_file(build / "images.safetensors")
    concepts = json.loads((build / "concepts.json").read_text(encoding="utf-8"))
    return data["rgba"], data["concept"], data["style"], concepts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--google", type=Path, required=True, help="the unpacked `package` folder")
    parser.add_argument("--twitter", type=Path, required=True, help="the unpacked `package` folder")
    parser.add_argument("--build", type=Path, required=True, help="folder for everything the recipes make")
    args = parser.parse_args()
    rows = select(json.loads((args.google / "emoji.json").read_text(encoding="utf-8")))
    images = []
    concept = []
    style = []
    concepts = []
    for index, row in enumerate(rows):
        concepts.append({"code": row["unified"].lower(), "names": phrases(row), "category": row["category"]})
        for number, (vendor, folder) in enumerate(zip(VENDORS, (args.google, args.twitter), strict=True)):
            if row[f"has_img_{vendor}"]:
                image = Image.open(folder / "img" / vendor / "64" / row["image"]).convert("RGBA")
                images.append(np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS)))
                concept.append(index)
                style.append(number)
    args.build.mkdir(parents=True, exist_ok=True)
    tensors = {
        "rgba": torch.from_numpy(np.stack(images)),
        "concept": torch.tensor(concept),
        "style": torch.tensor(style),
    }
    save_file(tensors, args.build / "images.safetensors")
    (args.build / "concepts.json").write_text(json.dumps(concepts, indent=1), encoding="utf-8")
    print(f"{len(concepts)} concepts, {len(images)} images in {args.build}")


if __name__ == "__main__":
    main()
