"""The embedded demo data: two subjects and one style, all Microsoft Fluent 3D emoji (MIT).

    npm pack @lobehub/fluent-emoji-3d@1.1.0                                    # then unpack with `tar -xzf`
    python train_scripts/pretrain/demo_data.py --fluent FLUENT --build BUILD --assets diffadapt/assets

`subjects/cat` is one cat with nine expressions, `subjects/monkey` the three wise monkeys: neither was ever
shown to the base. `style/fluent3d` is 300 emoji with captions to learn the style from and 200 others to judge
it by.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from emoji_data import article
from PIL import Image

CAT_NAMES = (
    "grinning",
    "tears_of_joy",
    "smiling",
    "heart_eyes",
    "wry_smile",
    "kissing",
    "pouting",
    "crying",
    "weary",
)
FIRST_CAT = 0x1F638
MONKEY_NAMES = ("see_no_evil", "hear_no_evil", "speak_no_evil")
FIRST_MONKEY = 0x1F648
LIKE_SUBJECTS = ("1f408", "1f408-200d-2b1b", "1f431", "1f412", "1f435")  # other cats and monkeys
SUBJECT_SIDE = 128  # pixels
TRAIN_COUNT = 300
HELD_OUT_COUNT = 200


def read_emoji(source: Path, size: int) -> Image.Image:
    """One emoji on white."""
    image = Image.open(source).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    composite = Image.alpha_composite(white, image).convert("RGB")
    return composite.resize((size, size), Image.Resampling.LANCZOS)


def write_subject(fluent: Path, folder: Path, first_code: int, names: Sequence[str]) -> None:
    """Consecutive code points, one PNG each."""
    folder.mkdir(parents=True, exist_ok=True)
    for code, name in enumerate(names, start=first_code):
        image = read_emoji(fluent / f"{code:x}.webp", SUBJECT_SIDE)
        image.save(folder / f"{name}.png", optimize=True)


def write_style(fluent: Path, folder: Path, concepts: list[dict], size: int) -> None:
    """WebP of `size` px and `metadata.jsonl`, as the image folder loader of `datasets` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in sorted(concepts, key=lambda row: row["code"]):
        name = f"{row['code']}.webp"
        read_emoji(fluent / name, size).save(folder / name, quality=85, method=6)
        text = article(f"a {row['names'][0]} emoji")
        lines.append(json.dumps({"file_name": name, "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fluent", type=Path, required=True, help="the unpacked `package` folder")
    parser.add_argument("--build", type=Path, required=True, help="folder made by emoji_data.py")
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--size", type=int, default=96, help="side of a style image")
    args = parser.parse_args()
    fluent = args.fluent / "assets"
    subjects = args.assets / "subjects"
    write_subject(fluent, subjects / "cat", FIRST_CAT, [f"{name}_cat" for name in CAT_NAMES])
    write_subject(fluent, subjects / "monkey", FIRST_MONKEY, [f"{name}_monkey" for name in MONKEY_NAMES])
    concepts = json.loads((args.build / "concepts.json").read_text(encoding="utf-8"))
    available = []
    for row in concepts:
        if row["code"] not in LIKE_SUBJECTS and (fluent / f"{row['code']}.webp").exists():
            available.append(row)
    emoji = random.Random(0).sample(available, TRAIN_COUNT + HELD_OUT_COUNT)
    style = args.assets / "style/fluent3d"
    write_style(fluent, style / "train", emoji[:TRAIN_COUNT], args.size)
    write_style(fluent, style / "held_out", emoji[TRAIN_COUNT:], args.size)
    print(f"{len(available)} of {len(concepts)} concepts exist as Fluent 3D; wrote 9 + 3 + 300 + 200 images")


if __name__ == "__main__":
    main()
