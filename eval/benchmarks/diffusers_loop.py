"""The training loop of diffusers' `train_dreambooth_lora.py`, restated for comparison in `real_models.py`.

The script itself is not part of the diffusers package. As there: PEFT's LoRA on the attention of the
denoiser, the base in the precision of `--mixed_precision`, images and prompt encoded in every step; with
`--encode_once` they are encoded before the first step. Writes the seconds of each step and the peak memory.
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
    """Trains and writes seconds and memory to a JSON file."""
    arguments = _parser().parse_args()
    torch.manual_seed(0)
    seconds = train(arguments)
    record = {"seconds": seconds, "peak_memory_bytes": peak_memory_bytes()}
    arguments.output.write_text(json.dumps(record), encoding="utf-8")


def train(arguments: argparse.Namespace) -> list[float]:
    """Trains a LoRA. Returns the seconds of every step."""
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    dtype = DTYPES[arguments.mixed_precision]
    pipe = StableDiffusionPipeline.from_pretrained(arguments.pretrained_model_name_or_path, torch_dtype=dtype)
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False).to(accelerator.device)
    targets = ["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
    rank = {"r": arguments.rank, "lora_alpha": arguments.rank}
    pipe.unet.add_adapter(LoraConfig(**rank, init_lora_weights="gaussian", target_modules=targets))
    trained = [p for p in pipe.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-2)
    schedule = get_scheduler("constant", optimizer)
    images = [_read_image(path, arguments.resolution) for path in list_images(arguments.instance_data_dir)]
    unet, optimizer, schedule = accelerator.prepare(pipe.unet, optimizer, schedule)
    unet.train()
    encoded = None
    if arguments.encode_once:
        encoded = [_encode(pipe, image, arguments, dtype) for image in images]
    seconds = []
    for step in range(arguments.max_train_steps):
        start = time.perf_counter()
        index = step % len(images)
        if encoded is None:
            latents, states = _encode(pipe, images[index], arguments, dtype)
        else:
            latents, states = encoded[index]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(latents),)).long()
        noisy = noise_scheduler.add_noise(latents, noise, timesteps)
        predicted = unet(noisy, timesteps, states, return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), noise.float(), reduction="mean")
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - start)
    return seconds


def _read_image(path: Path, resolution: int) -> torch.Tensor:
    """An image as the script's data set gives it: resized, cropped at the center, (1, 3, H, W) in [-1, 1]."""
    transform = transforms.Compose(
        [
            transforms.Resize(resolution, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(resolution),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    return transform(open_image(path))[None]


@torch.no_grad()
def _encode(
    pipe: StableDiffusionPipeline, image: torch.Tensor, arguments: argparse.Namespace, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (1, 4, h, w) of an image, and states of the text encoder (1, 77, width) of the prompt."""
    latents = pipe.vae.encode(image.to(dtype)).latent_dist.sample() * pipe.vae.config.scaling_factor
    length = pipe.tokenizer.model_max_length
    ids = pipe.tokenizer(
        arguments.instance_prompt,
        truncation=True,
        padding="max_length",
        max_length=length,
        return_tensors="pt",
    )
    return latents, pipe.text_encoder(ids.input_ids)[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="folder of the base")
    add("--instance_data_dir", required=True, help="folder of training images")
    add("--instance_prompt", required=True, help="prompt of the training images")
    add("--resolution", type=int, default=512, help="height and width of training images (default: 512)")
    add("--rank", type=int, default=4, help="rank of the LoRA (default: 4)")
    add("--max_train_steps", type=int, default=5, help="training steps (default: 5)")
    add("--mixed_precision", choices=DTYPES, default="no", help="precision (default: no)")
    add("--encode_once", action="store_true", help="encode images and prompt before the first step")
    add("--output", type=Path, required=True, help="JSON file to write")
    return parser


if __name__ == "__main__":
    main()
