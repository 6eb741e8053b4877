"""A small class-conditional base: a UNet2DModel in pixel space with a null class for guidance.

    python digits.py --build BUILD --fonts FONTS               # `digits`: half an hour on two cores
    python digits.py --build BUILD --source handwriting        # the reverse base
    python digits.py --build BUILD --data FOLDER_OR_DATASET --resolution 32 --channels 64 128 128

v-prediction, bf16 where native, 10 % dropped labels, averaged weights. Continues from BUILD/unet.state;
writes BUILD/pipeline (float32), BUILD/unet.json and BUILD/samples-*.png at every checkpoint.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from digits_data import Labelled, find_fonts, handwritten, printed, read
from progress import replace_folder, restore, save, set_learning_rate
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.utils import save_image

from diffadapt.common.precision import fast_autocast
from diffadapt.pipelines import ClassConditionalPipeline

LABEL_DROPOUT = 0.1  # share of labels replaced by the null class
LOSS_WINDOW = 200  # steps over which the printed loss is averaged
SAMPLE_CLASSES = 20  # of the image sheet
SAMPLES_PER_CLASS = 4


def build_unet(classes: int, resolution: int, channels: list[int]) -> UNet2DModel:
    """Attention below the top level, so that query and value weights come in several sizes."""
    lower_levels = len(channels) - 1
    return UNet2DModel(
        sample_size=resolution,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) + ("AttnDownBlock2D",) * lower_levels,
        up_block_types=("AttnUpBlock2D",) * lower_levels + ("UpBlock2D",),
        attention_head_dim=8,
        norm_num_groups=8,
        num_class_embeds=classes + 1,
    )


def build_sampler() -> DDIMScheduler:
    """The sampler of the pipeline, whose noise schedule is that of training."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",  # ends in pure noise, Nichol and Dhariwal 2021
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=True,
    )


def v_prediction_loss(
    unet: nn.Module, schedule: DDPMScheduler, pixels: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    """The mean squared error of v (Salimans and Ho 2022) for pixels (B, 3, H, W) and labels (B,)."""
    noise = torch.randn(pixels.shape, generator=generator)
    timesteps = torch.randint(schedule.config.num_train_timesteps, (len(pixels),), generator=generator)
    noisy = schedule.add_noise(pixels, noise, timesteps)
    target = schedule.get_velocity(pixels, noise, timesteps)
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    with fast_autocast(torch.device("cpu")), sdpa_kernel(SDPBackend.MATH):
        predicted = unet(noisy, timesteps, class_labels=labels).sample
    return F.mse_loss(predicted.float(), target)


def random_batch(data: Labelled, size: int, null_class: int, generator: torch.Generator) -> Labelled:
    """Random images in [-1, 1] with labels, some of them dropped."""
    images, labels = data
    rows = torch.randint(len(images), (size,), generator=generator)
    is_dropped = torch.rand(size, generator=generator) < LABEL_DROPOUT
    return images[rows].float() / 127.5 - 1, labels[rows].masked_fill(is_dropped, null_class)


def train(models: nn.ModuleDict, data: Labelled, args: argparse.Namespace) -> dict:
    """Trains to `--steps` and returns the last step's figures."""
    unet = models["unet"]
    groups = [{"params": unet.parameters(), "peak": args.lr}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start, seconds = restore(args.build / "unet.state", models, optimizer)
    schedule = DDPMScheduler.from_config(build_sampler().config)
    null_class = unet.config.num_class_embeds - 1
    trained = list(unet.parameters())
    averaged = list(models["mean"].parameters())
    began = time.time() - seconds
    losses: list[float] = []
    figures: dict = {"steps": start, "batch": args.batch}
    for step in range(start, args.steps):
        set_learning_rate(optimizer, step, args.steps)
        generator = torch.Generator().manual_seed(step)
        pixels, labels = random_batch(data, args.batch, null_class, generator)
        loss = v_prediction_loss(unet, schedule, pixels, labels, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            decay = min(args.decay, (1 + step) / (10 + step))  # short at first: the start is forgotten
            torch._foreach_lerp_(averaged, trained, 1 - decay)
        losses = [*losses[-LOSS_WINDOW + 1 :], loss.item()]
        figures["steps"] = step + 1
        figures["loss"] = float(np.mean(losses))
        figures["seconds"] = time.time() - began
        if (step + 1) % 50 == 0:
            print(json.dumps({key: round(value, 4) for key, value in figures.items()}), flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(args.build / "unet.state", models, optimizer, step + 1, figures["seconds"])
            write_pipeline(models["mean"], args.build, step + 1)
    return figures


def write_pipeline(unet: UNet2DModel, build: Path, step: int) -> None:
    """Saves the pipeline in float32, and an image sheet: a row per try, a column per class."""
    null_class = unet.config.num_class_embeds - 1
    pipe = ClassConditionalPipeline(unet, build_sampler(), null_class=null_class)
    replace_folder(build / "pipeline", pipe.save_pretrained)
    pipe.set_progress_bar_config(disable=True)
    labels = list(range(min(null_class, SAMPLE_CLASSES))) * SAMPLES_PER_CLASS
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(labels))]
    images = pipe(labels, 2.0, 25, generator=seeds, output_type="pt").images
    enlarged = images.repeat_interleave(3, 2).repeat_interleave(3, 3)
    save_image(enlarged, build / f"samples-{step:05d}.png", nrow=10)


def read_data(args: argparse.Namespace) -> Labelled:
    """The images and labels that the options name."""
    if args.data:
        return read(args.data, args.data_config, args.resolution)
    if args.source == "handwriting":
        return handwritten(args.resolution)["train"]
    return printed(find_fonts(args.fonts), args.count, args.resolution)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--source", choices=("printed", "handwriting"), default="printed")
    parser.add_argument("--data", help="instead of --source: a folder of class folders, or a data set")
    parser.add_argument("--data_config", help="its configuration, such as cropped_digits of svhn")
    parser.add_argument("--fonts", type=Path, nargs="*", default=[], help="more fonts than matplotlib's")
    parser.add_argument("--count", type=int, default=40_000, help="printed digits to render")
    parser.add_argument("--resolution", type=int, default=16)
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 40, 56], help="of each level")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--decay", type=float, default=0.998, help="of the averaged weights")
    parser.add_argument("--save_every", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.build.mkdir(parents=True, exist_ok=True)
    images, labels = read_data(args)
    unet = build_unet(int(labels.max()) + 1, args.resolution, args.channels)
    unet = unet.to(memory_format=torch.channels_last)
    models = nn.ModuleDict({"unet": unet, "mean": copy.deepcopy(unet).requires_grad_(False).eval()})
    figures = train(models, (images, labels), args)
    figures["parameters"] = sum(p.numel() for p in unet.parameters())
    figures["images"] = len(images)
    (args.build / "unet.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
