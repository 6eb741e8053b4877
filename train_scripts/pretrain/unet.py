"""The denoiser of the embedded base: a two-level UNet2DConditionModel on the latents of vae.py.

    python train_scripts/pretrain/unet.py --build BUILD --steps 7000        # about two hours on two cores

v-prediction, large batches, bf16 where the CPU has it. The text encoder starts as a copy of clip's and learns
along at a lower rate. Latents and tokens are made once. Continues from BUILD/unet.state; writes
BUILD/pipeline (float32, averaged weights), BUILD/samples-*.png at every checkpoint, and BUILD/unet.json.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from base import build_unet, sampler, write
from diffusers import AutoencoderTiny, DDPMScheduler
from latents import Ready, batch, prepare
from progress import restore, save, set_rate
from scenes import Scenes
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

from diffadapt.common.precision import fast_autocast


def loss_of(
    models: nn.ModuleDict, noiser: DDPMScheduler, latents: Tensor, ids: Tensor, generator: torch.Generator
) -> Tensor:
    noise = torch.randn(latents.shape, generator=generator)
    t = torch.randint(1000, (len(latents),), generator=generator)
    noisy, target = noiser.add_noise(latents, noise, t), noiser.get_velocity(latents, noise, t)
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    with fast_autocast(torch.device("cpu")), sdpa_kernel(SDPBackend.MATH):
        states = models["text_encoder"](ids).last_hidden_state
        made = models["unet"](noisy, t, states).sample
    return F.mse_loss(made.float(), target)


def train(
    models: nn.ModuleDict,
    vae: AutoencoderTiny,
    tokenizer: CLIPTokenizer,
    ready: Ready,
    args: argparse.Namespace,
) -> dict:
    groups = [{"params": models["unet"].parameters(), "peak": args.lr}]
    groups += [{"params": models["text_encoder"].parameters(), "peak": args.text_lr}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start, seconds = restore(args.build / "unet.state", models, optimizer)
    noiser, empty = DDPMScheduler.from_config(sampler().config), tokenizer("", padding="max_length").input_ids
    live = [p for name in ("unet", "text_encoder") for p in models[name].parameters()]
    mean = [p for name in ("mean_unet", "mean_text_encoder") for p in models[name].parameters()]
    begun, losses, figures = time.time() - seconds, [], {}
    for step in range(start, args.steps):
        set_rate(optimizer, step, args.steps)
        generator = torch.Generator().manual_seed(step)
        latents, ids = batch(ready, torch.tensor(empty), args.batch, generator)
        loss = loss_of(models, noiser, latents, ids, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(live, 1.0)
        optimizer.step(), optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(mean, live, 1 - min(args.decay, (1 + step) / (10 + step)))
        losses = [*losses[-99:], loss.item()]
        figures = {"steps": step + 1, "loss": sum(losses) / len(losses), "seconds": time.time() - begun}
        if (step + 1) % 20 == 0:
            print(json.dumps({key: round(value, 4) for key, value in figures.items()}), flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(args.build / "unet.state", models, optimizer, step + 1, figures["seconds"])
            write(models["mean_unet"], models["mean_text_encoder"], vae, tokenizer, args.build, step + 1)
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
    ready = prepare(Scenes(args.build), vae, tokenizer)
    figures = train(models, vae, tokenizer, ready, args)
    figures["parameters"] = sum(p.numel() for p in unet.parameters())
    figures["text_parameters"] = sum(p.numel() for p in models["text_encoder"].parameters())
    (args.build / "unet.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
