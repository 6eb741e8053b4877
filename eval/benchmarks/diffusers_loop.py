"""The training loop of diffusers' `train_dreambooth_lora.py`, restated for comparison in `real_models.py`.

The script itself is not part of the diffusers package. As there: PEFT's LoRA on the attention of the
denoiser, the base in the precision of `--mixed_precision`, pictures and prompt encoded in every step; with
`--encode_once` they are encoded before the first. Writes the seconds of each step and the peak memory.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from torchvision import transforms

from diffadapt.common.images import list_images, open_image
from diffadapt.training.run_log import peak_memory_bytes

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--instance_data_dir", required=True)
    parser.add_argument("--instance_prompt", required=True)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--max_train_steps", type=int, default=5)
    parser.add_argument("--mixed_precision", choices=DTYPES, default="no")
    parser.add_argument("--encode_once", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    seconds = train(arguments)
    arguments.output.write_text(
        json.dumps({"seconds": seconds, "peak_memory_bytes": peak_memory_bytes()}), encoding="utf-8"
    )


def train(arguments: argparse.Namespace) -> list[float]:
    """Seconds of every step."""
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    dtype = DTYPES[arguments.mixed_precision]
    pipe = StableDiffusionPipeline.from_pretrained(arguments.pretrained_model_name_or_path, torch_dtype=dtype)
    noiser = DDPMScheduler.from_config(pipe.scheduler.config)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False).to(accelerator.device)
    targets = ["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
    rank = {"r": arguments.rank, "lora_alpha": arguments.rank}
    pipe.unet.add_adapter(LoraConfig(**rank, init_lora_weights="gaussian", target_modules=targets))
    trained = [p for p in pipe.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-2)
    schedule = get_scheduler("constant", optimizer)
    pixels = [_pixels(path, arguments.resolution) for path in list_images(arguments.instance_data_dir)]
    unet, optimizer, schedule = accelerator.prepare(pipe.unet, optimizer, schedule)
    unet.train()
    once = [_encode(pipe, picture, arguments, dtype) for picture in pixels] if arguments.encode_once else None
    seconds = []
    for step in range(arguments.max_train_steps):
        started = time.perf_counter()
        index = step % len(pixels)
        latents, states = once[index] if once else _encode(pipe, pixels[index], arguments, dtype)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, noiser.config.num_train_timesteps, (len(latents),)).long()
        noisy = noiser.add_noise(latents, noise, timesteps)
        predicted = unet(noisy, timesteps, states, return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), noise.float(), reduction="mean")
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - started)
    return seconds


def _pixels(path: Path, resolution: int) -> torch.Tensor:
    """As the script's data set: resized, cut in the middle, in [-1, 1]."""
    steps = transforms.Compose(
        [
            transforms.Resize(resolution, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(resolution),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    return steps(open_image(path))[None]


@torch.no_grad()
def _encode(
    pipe: StableDiffusionPipeline, picture: torch.Tensor, arguments: argparse.Namespace, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    latents = pipe.vae.encode(picture.to(dtype)).latent_dist.sample() * pipe.vae.config.scaling_factor
    length = pipe.tokenizer.model_max_length
    ids = pipe.tokenizer(
        arguments.instance_prompt,
        truncation=True,
        padding="max_length",
        max_length=length,
        return_tensors="pt",
    )
    return latents, pipe.text_encoder(ids.input_ids)[0]


if __name__ == "__main__":
    main()
