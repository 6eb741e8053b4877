"""The denoiser of the embedded base: a two-level UNet2DConditionModel on the latents of vae.py.

    python train_scripts/pretrain/unet.py --build BUILD --steps 7000        # about two hours on two cores

v-prediction, large batches, bf16 where the CPU has it. The text encoder starts as a copy of clip's and is
trained too, at a lower rate. Latents and tokens are made once. Continues from BUILD/unet.state; writes
BUILD/pipeline (float32, averaged weights), BUILD/samples-*.png at every checkpoint, and BUILD/unet.json.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from base import build_sampler, build_unet, write_pipeline
from diffusers import AutoencoderTiny, DDPMScheduler
from latents import EncodedScenes, encode_scenes, random_batch
from progress import restore, save, set_learning_rate
from scenes import Scenes
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

from diffadapt.common.precision import fast_autocast

LOSS_WINDOW = 100  # steps over which the printed loss is averaged


def v_prediction_loss(
    models: nn.ModuleDict,
    schedule: DDPMScheduler,
    latents: Tensor,
    tokens: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """The mean squared error of v (Salimans and Ho 2022) for latents (B, C, h, w) and tokens (B, L)."""
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(1000, (len(latents),), generator=generator)
    noisy = schedule.add_noise(latents, noise, timesteps)
    target = schedule.get_velocity(latents, noise, timesteps)
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    with fast_autocast(torch.device("cpu")), sdpa_kernel(SDPBackend.MATH):
        states = models["text_encoder"](tokens).last_hidden_state
        predicted = models["unet"](noisy, timesteps, states).sample
    return F.mse_loss(predicted.float(), target)


def train(
    models: nn.ModuleDict,
    vae: AutoencoderTiny,
    tokenizer: CLIPTokenizer,
    encoded: EncodedScenes,
    args: argparse.Namespace,
) -> dict:
    """Trains to `--steps` and returns the last step's figures."""
    groups = [
        {"params": models["unet"].parameters(), "peak": args.lr},
        {"params": models["text_encoder"].parameters(), "peak": args.text_lr},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start, seconds = restore(args.build / "unet.state", models, optimizer)
    schedule = DDPMScheduler.from_config(build_sampler().config)
    empty_tokens = torch.tensor(tokenizer("", padding="max_length").input_ids)
    trained = [*models["unet"].parameters(), *models["text_encoder"].parameters()]
    averaged = [*models["mean_unet"].parameters(), *models["mean_text_encoder"].parameters()]
    began = time.time() - seconds
    losses: list[float] = []
    figures: dict = {}
    for step in range(start, args.steps):
        set_learning_rate(optimizer, step, args.steps)
        generator = torch.Generator().manual_seed(step)
        latents, tokens = random_batch(encoded, empty_tokens, args.batch, generator)
        loss = v_prediction_loss(models, schedule, latents, tokens, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            decay = min(args.decay, (1 + step) / (10 + step))  # short at first: the start is forgotten
            torch._foreach_lerp_(averaged, trained, 1 - decay)
        losses = [*losses[-LOSS_WINDOW + 1 :], loss.item()]
        figures = {"steps": step + 1, "loss": sum(losses) / len(losses), "seconds": time.time() - began}
        if (step + 1) % 20 == 0:
            print(json.dumps({key: round(value, 4) for key, value in figures.items()}), flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(args.build / "unet.state", models, optimizer, step + 1, figures["seconds"])
            write_pipeline(
                models["mean_unet"], models["mean_text_encoder"], vae, tokenizer, args.build, step + 1
            )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, required=True, help="folder with data, tokenizer, clip and vae")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--text_lr", type=float, default=1e-4)
    parser.add_argument("--decay", type=float, default=0.998, help="of the averaged weights")
    parser.add_argument("--save_every", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(args.build / "tokenizer")
    vae = AutoencoderTiny.from_pretrained(args.build / "vae")
    unet = build_unet().to(memory_format=torch.channels_last)
    models = nn.ModuleDict({"unet": unet, "text_encoder": CLIPTextModel.from_pretrained(args.build / "clip")})
    for name in ("unet", "text_encoder"):
        models[f"mean_{name}"] = copy.deepcopy(models[name]).requires_grad_(False).eval()
    encoded = encode_scenes(Scenes(args.build), vae, tokenizer)
    figures = train(models, vae, tokenizer, encoded, args)
    figures["parameters"] = sum(p.numel() for p in unet.parameters())
    figures["text_parameters"] = sum(p.numel() for p in models["text_encoder"].parameters())
    (args.build / "unet.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
