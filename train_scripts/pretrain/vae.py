"""The autoencoder of the embedded base: an AutoencoderTiny, 64x64x3 pixels to 8x8x16 latents.

    python train_scripts/pretrain/vae.py --build BUILD --steps 1400        # about 13 minutes on two cores

Most layers work at low resolution: the encoder goes down at once and only one block sees 64x64. The latents
are held near unit variance by a small penalty, so that the base needs no scaling factor, and get a little
noise before they are decoded, which makes the decoder forgive small errors of the diffusion model.
Continues from BUILD/vae.state; writes BUILD/vae (float32) and BUILD/vae.json (figures).
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from PIL import Image
from progress import restore, save, set_rate
from scenes import Scenes, augment, composite
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from diffadapt.common.precision import fast_autocast


def build_model() -> AutoencoderTiny:
    """1.3 million parameters."""
    return AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48, 48),
        decoder_block_out_channels=(48, 48, 48, 48),
        num_encoder_blocks=(0, 1, 3, 4),
        num_decoder_blocks=(4, 3, 2, 1),
        latent_channels=16,
        scaling_factor=1.0,
    )


def difference(made: Tensor, real: Tensor) -> Tensor:
    """L1 and squared error, plus L1 of the edges, at full, half and quarter size."""
    total = F.mse_loss(made, real)
    for _ in range(3):
        total = total + F.l1_loss(made, real)
        for axis in (2, 3):
            total = total + 0.5 * F.l1_loss(made.diff(dim=axis), real.diff(dim=axis))
        made, real = F.avg_pool2d(made, 2), F.avg_pool2d(real, 2)
    return total


def spread(latents: Tensor) -> Tensor:
    """How far the channels are from mean 0 and deviation 1."""
    channels = latents.float().transpose(0, 1).flatten(1)
    return (channels.mean(1) ** 2 + (channels.std(1) - 1) ** 2).mean()


def train(model: AutoencoderTiny, scenes: Scenes, args: argparse.Namespace) -> dict:
    optimizer = torch.optim.AdamW(
        [{"params": model.parameters(), "peak": args.lr}], betas=(0.9, 0.99), weight_decay=0.01
    )
    start, seconds = restore(args.build / "vae.state", model, optimizer)
    begun, figures = time.time() - seconds, {}
    for step in range(start, args.steps):
        set_rate(optimizer, step, args.steps)
        rng, generator = random.Random(step), torch.Generator().manual_seed(step)
        images = [scenes.draw(i, rng)[0] for i in rng.sample(range(len(scenes.concept)), args.batch)]
        real = augment(torch.stack(images), generator, zoom=0.35, gain=0.5)
        real = real.contiguous(memory_format=torch.channels_last)
        with fast_autocast(torch.device("cpu")):
            latents = model.encode(real).latents
            noise = torch.randn(latents.shape, generator=generator)
            made = model.decode(latents + args.noise * noise).sample
        loss = difference(made.float(), real) + 0.02 * spread(latents)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        figures = {"steps": step + 1, "loss": loss.item(), "latent_std": latents.std().item()}
        figures |= {"batch_psnr": psnr(made.float(), real), "seconds": time.time() - begun}
        if (step + 1) % 50 == 0:
            print(json.dumps({key: round(value, 4) for key, value in figures.items()}), flush=True)
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            save(args.build / "vae.state", model, optimizer, step + 1, figures["seconds"])
    return figures


def psnr(made: Tensor, real: Tensor) -> float:
    """Mean over the images, in dB."""
    error = ((made.clamp(-1, 1) - real) ** 2).flatten(1).mean(1).clamp_min(1e-10) / 4
    return (-10 * error.log10()).mean().item()


@torch.no_grad()
def quality(model: AutoencoderTiny, images: Tensor) -> float:
    return psnr(torch.cat([model(part).sample for part in images.split(128)]), images)


def folder_images(folder: Path) -> Tensor:
    """All PNG of a folder at 64 px: (N, 3, 64, 64) in [-1, 1]."""
    images = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]
    return torch.stack(
        [pil_to_tensor(i.resize((64, 64), Image.Resampling.LANCZOS)) / 127.5 - 1 for i in images]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, required=True, help="folder made by emoji_data.py")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--noise", type=float, default=0.1, help="deviation of the noise on the latents")
    parser.add_argument(
        "--unseen", type=Path, nargs="*", default=[], help="image folders to measure, not trained on"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    scenes, model = Scenes(args.build), build_model().to(memory_format=torch.channels_last)
    figures = train(model, scenes, args)
    images = composite(scenes.rgba)
    for style, name in enumerate(("noto", "twemoji")):
        figures[f"psnr_{name}"] = quality(model, images[torch.tensor(scenes.style) == style])
    for folder in args.unseen:
        figures[f"psnr_{folder.name}"] = quality(model, folder_images(folder))
    figures["parameters"] = sum(p.numel() for p in model.parameters())
    model.save_pretrained(args.build / "vae")
    (args.build / "vae.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
