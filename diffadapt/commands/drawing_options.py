"""Options of drawing images, the same for `diffadapt sample` and `eval/image_quality.py`."""

from __future__ import annotations

import argparse

MINIMA = {  # option -> its smallest value
    "num_images": 1,
    "seed": 0,
    "num_inference_steps": 1,
    "guidance_scale": 0,
    "height": 8,
    "width": 8,
    "batch_size": 1,
    "num_threads": 1,
}
PROMPTS_FILE = r"a text file with a prompt on each line; lines with # are remarks, \# begins a prompt with #"


def add_drawing_options(parser: argparse.ArgumentParser, *, num_images: int) -> None:
    """What is drawn, from which base, and how; num_images: the default per prompt."""
    add = parser.add_argument
    add("--prompt", action="append", help="repeat for several prompts")
    add("--prompts_file", "--prompts", help=PROMPTS_FILE)
    add("--class_labels", help="classes with commas, for a base that is told classes: 0,3,7 or names")
    add("--num_images", type=int, default=num_images, help=f"images per prompt (default: {num_images})")
    add("--seed", type=int, default=0, help="seed of the first image, the next has the next (default: 0)")
    add("--pretrained_model_name_or_path", "--base", dest="base", help="default: the base named in the file")
    add("--revision", help="branch, tag or commit of a base from the hub")
    add("--variant", help="variant of the base's files, such as fp16")
    add("--pretrained_vae_model_name_or_path", dest="vae", help="another autoencoder than the base's own")
    add("--prediction_type", help="what the base predicts, where its files do not say: epsilon, v_prediction")
    add("--num_inference_steps", type=int, help="denoising steps; default: what suits the base")
    add("--guidance_scale", type=float, help="classifier-free guidance; default: what suits the base")
    add("--scheduler", help="ddim, ddpm, dpm++, euler, euler_a, pndm or unipc; default: the base's own")
    add("--negative_prompt", help="what the images should not show")
    add("--height", type=int, help="pixels; default: the size of the training images")
    add("--width", type=int, help="pixels; default: the size of the training images")
    add("--batch_size", type=int, help="images drawn at once; the images do not depend on it")
    add(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        help="default: that of accelerate launch; else fp16 on a GPU, no on a CPU",
    )
    add("--num_threads", type=int, help="CPU threads; default: all available cores")
