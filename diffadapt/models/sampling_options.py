"""Command-line options of sampling, the same for `diffadapt sample` and `eval/image_quality.py`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from diffadapt.common.atomic_files import read_text, text_lines
from diffadapt.formats.adapter_file import read_metadata
from diffadapt.models.class_labels import parse_class_labels, read_class_names
from diffadapt.models.denoiser_loading import QUANTISED
from diffadapt.models.sampling import ImageRequest, SamplingConfig, image_requests

PIPELINE_STEP = 8  # pixels; pipelines generate images whose sides are multiples of it
MINIMUM_VALUES = {  # option -> its smallest value
    "num_images": 1,
    "seed": 0,
    "num_inference_steps": 1,
    "guidance_scale": 0,
    "height": 8,
    "width": 8,
    "batch_size": 1,
    "num_threads": 1,
}
PROMPTS_FILE = r"text file with one prompt per line; # starts a comment line, \# a prompt that begins with #"

BASE = "base model (default: the one named in the adapter file)"


def add_sampling_options(parser: argparse.ArgumentParser, *, num_images: int) -> None:
    """What is drawn, from which base, and how; num_images: the default per prompt."""
    add = parser.add_argument
    add("--prompt", action="append", help="prompt; repeat for several prompts")
    add("--prompts_file", "--prompts", help=PROMPTS_FILE)
    add(
        "--class_labels",
        help="for a class-conditional base: classes, separated by commas, as numbers or names",
    )
    add("--num_images", type=int, default=num_images, help=f"images per prompt (default: {num_images})")
    add("--seed", type=int, default=0, help="seed of the first image; it grows by 1 per image (default: 0)")
    add("--pretrained_model_name_or_path", "--base", dest="base", help=BASE)
    add("--revision", help="branch, tag or commit of a base on the hub")
    add("--variant", help="variant of the base's files, such as fp16")
    add("--pretrained_vae_model_name_or_path", dest="vae", help="autoencoder to use instead of the base's")
    add("--base_precision", choices=tuple(QUANTISED), help="quantise the denoiser (default: it is not)")
    add("--transformer", help=".gguf or .safetensors file with the denoiser's weights")
    add("--prediction_type", help="override the scheduler's prediction type: epsilon or v_prediction")
    add("--num_inference_steps", type=int, help="denoising steps (default: depends on the base)")
    add("--guidance_scale", type=float, help="classifier-free guidance scale (default: depends on the base)")
    add("--scheduler", help="ddim, ddpm, dpm++, euler, euler_a, pndm or unipc (default: the base's)")
    add("--negative_prompt", help="description of what the images should not show")
    add("--height", type=int, help="in pixels (default: the size of the training images)")
    add("--width", type=int, help="in pixels (default: the size of the training images)")
    add("--batch_size", type=int, help="images generated at once; they do not depend on it")
    add(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        help="precision (default: that of accelerate launch, else fp16 on a GPU and no on a CPU)",
    )
    add("--num_threads", type=int, help="CPU threads (default: one per idle core)")


def loading_options(arguments: argparse.Namespace) -> dict[str, object]:
    """Arguments of `open_frozen_pipeline` besides the base's name and the device.

    Args:
        arguments: of `add_sampling_options`.
    """
    names = ("revision", "variant", "vae", "prediction_type", "base_precision", "transformer")
    return {name: getattr(arguments, name) for name in names}


def requested_images(arguments: argparse.Namespace, files: Sequence[str]) -> list[ImageRequest]:
    """The images of one column: of every prompt or class, with consecutive seeds.

    Args:
        arguments: of `add_sampling_options`.
        files: adapter files, whose classes can be requested by name.

    Raises:
        ValueError: there are both prompts and classes, or neither, or a class is unknown.
    """
    prompts = list(arguments.prompt or [])
    if arguments.prompts_file:
        prompts += read_prompts(arguments.prompts_file)
    if arguments.class_labels is not None and prompts:
        raise ValueError(
            "give prompts or --class_labels: a base is conditioned on either captions or classes"
        )
    if arguments.class_labels is not None:
        return _requested_classes(arguments, read_class_names(files))
    if not prompts:
        raise ValueError("nothing to generate; give --prompt, --prompts_file or --class_labels")
    requests = []
    for prompt in prompts:
        requests += image_requests(prompt, arguments.num_images, seed=arguments.seed)
    return requests


def _requested_classes(arguments: argparse.Namespace, names: Mapping[int, str]) -> list[ImageRequest]:
    requests = []
    for label in parse_class_labels(arguments.class_labels, names):
        title = f"class {names.get(label, label)}"
        for seed in range(arguments.seed, arguments.seed + arguments.num_images):
            requests.append(ImageRequest(title, seed, label))
    return requests


def read_prompts(path: str | Path) -> list[str]:
    r"""The prompts of a file, one per line; "# ..." is a comment, "\# ..." a prompt that begins with #."""
    prompts = []
    for line in text_lines(read_text(path)):
        prompt = " ".join(line.split())
        if not prompt or prompt.startswith("#"):
            continue
        if prompt.startswith("\\#"):
            prompt = prompt.removeprefix("\\")
        prompts.append(prompt)
    return prompts


def make_sampling_config(
    arguments: argparse.Namespace,
    defaults: Mapping[str, object],
    autocast: torch.dtype | None,
    files: Sequence[str],
) -> SamplingConfig:
    """The sampling options, with defaults for those that were not given.

    Args:
        arguments: of `add_sampling_options`.
        defaults: of the base.
        autocast: precision of the denoiser's activations.
        files: adapter files; without a size, images are as large as those they were trained on.
    """
    height = arguments.height
    width = arguments.width
    if height is None and width is None:
        height = width = training_resolution(files)

    def value_or_default(value: object, default: str) -> object:
        return defaults[default] if value is None else value

    return SamplingConfig(
        num_inference_steps=value_or_default(arguments.num_inference_steps, "num_inference_steps"),
        guidance_scale=value_or_default(arguments.guidance_scale, "guidance_scale"),
        negative_prompt=arguments.negative_prompt,
        scheduler=arguments.scheduler,
        height=height,
        width=width,
        batch_size=value_or_default(arguments.batch_size, "sample_batch_size"),
        autocast=autocast,
    )


def training_resolution(files: Sequence[str]) -> int | None:
    """The side, in pixels, that pipelines can generate nearest to the training images of adapter files.

    None where a file does not say, or where they differ: then the base's own size is the better guess.
    """
    resolutions = {str(read_metadata(file).get("resolution", "")) for file in files}
    if len(resolutions) != 1:
        return None
    resolution = resolutions.pop()
    if not resolution.isdecimal():
        return None
    return int(resolution) // PIPELINE_STEP * PIPELINE_STEP or None  # rounded down
