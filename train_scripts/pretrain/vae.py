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
from progress import restore, save, set_learning_rate
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


def reconstruction_loss(decoded: Tensor, real: Tensor) -> Tensor:
    """Squared error, and L1 of pixels and edges at full, half and quarter size, of (B, 3, H, W) images."""
    total = F.mse_loss(decoded, real)
    for _ in range(3):
        total = total + F.l1_loss(decoded, real)
        for axis in (2, 3):
            total = total + 0.5 * F.l1_loss(decoded.diff(dim=axis), real.diff(dim=axis))
        decoded = F.avg_pool2d(decoded, 2)
        real = F.avg_pool2d(real, 2)
    return total


def unit_variance_penalty(latents: Tensor) -> Tensor:
    """The mean over channels of mean^2 + (deviation - 1)^2, for latents (B, C, h, w)."""
    channels = latents.float().transpose(0, 1).flatten(1)  # (C, B h w)
    return (channels.mean(1) ** 2 + (channels.std(1) - 1) ** 2).mean()


def train(model: AutoencoderTiny, scenes: Scenes, args: argparse.Namespace) -> dict:
    """Trains to `--steps` and returns the last step's figures."""
    optimizer = torch.optim.AdamW(
        [{"params": model.parameters(), "peak": args.lr}], betas=(0.9, 0.99), weight_decay=0.01
    )
    start, seconds = restore(args.build / "vae.state", model, optimizer)
    began = time.time() - seconds
    figures: dict = {}
    for step in range(start, args.steps):
        set_learning_rate(optimizer, step, args.steps)
        rng = random.Random(step)
        generator = torch.Generator().manual_seed(step)
        images = [scenes.draw(i, rng)[0] for i in rng.sample(range(len(scenes.concept)), args.batch)]
        real = augment(torch.stack(images), generator, zoom=0.35, gain=0.5)  # (B, 3, 64, 64)
        real = real.contiguous(memory_format=torch.channels_last)
        with fast_autocast(torch.device("cpu")):
            latents = model.encode(real).latents  # (B, 16, 8, 8)
            noise = torch.randn(latents.shape, generator=generator)
            decoded = model.decode(latents + args.noise * noise).sample  # forgives small errors of latents
        loss = reconstruction_loss(decoded.float(), real) + 0.02 * unit_variance_penalty(latents)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        figures = {
            "steps": step + 1,
            "loss": loss.item(),
            "latent_std": latents.std().item(),
            "batch_psnr": psnr(decoded.float(), real),
            "seconds": time.time() - began,
        }
        if (step + 1) % 50 == 0:
            print(json.dumps({key: round(value, 4) for key, value in figures.items()}), flush=True)
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            save(args.build / "vae.state", model, optimizer, step + 1, figures["seconds"])
    return figures


def psnr(decoded: Tensor, real: Tensor) -> float:
    """The peak signal-to-noise ratio in dB, mean over (N, 3, H, W) images in [-1, 1]."""
    # The range is 2, so its square is 4: PSNR = -10 log10(MSE / 4)
    error = ((decoded.clamp(-1, 1) - real) ** 2).flatten(1).mean(1).clamp_min(1e-10) / 4
    return (-10 * error.log10()).mean().item()


@torch.no_grad()
def reconstruction_psnr(model: AutoencoderTiny, images: Tensor) -> float:
    """The PSNR of encoding and decoding images."""
    return psnr(torch.cat([model(part).sample for part in images.split(128)]), images)


def read_folder(folder: Path) -> Tensor:
    """All PNG of a folder at 64 px: (N, 3, 64, 64) in [-1, 1]."""
    images = []
    for path in sorted(folder.glob("*.png")):
        image = Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
        images.append(pil_to_tensor(image) / 127.5 - 1)
    return torch.stack(images)


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
    scenes = Scenes(args.build)
    model = build_model().to(memory_format=torch.channels_last)
    figures = train(model, scenes, args)
    images = composite(scenes.rgba)
    for style, name in enumerate(("noto", "twemoji")):
        figures[f"psnr_{name}"] = reconstruction_psnr(model, images[torch.tensor(scenes.style) == style])
    for folder in args.unseen:
        figures[f"psnr_{folder.name}"] = reconstruction_psnr(model, read_folder(folder))
    figures["parameters"] = sum(p.numel() for p in model.parameters())
    model.save_pretrained(args.build / "vae")
    (args.build / "vae.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
