"""The loop gives the losses of diffusers' `train_text_to_image_lora.py`, restated with PEFT and datasets."""

import json

import datasets
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.training_utils import compute_snr
from helpers.pipelines import tiny_sd_pipeline, train_options, write_pictures
from peft import LoraConfig
from torchvision import transforms

import diffadapt as da
from diffadapt.common.keyed_random import normal, uniform
from diffadapt.data.batches import Batches
from diffadapt.data.folders import read_captioned_folder
from diffadapt.models.families import load_base
from diffadapt.training.loop import initial_state, train
from diffadapt.training.objective import Objective

STEPS, BATCH, RATE, SEED = 20, 2, 1e-3, 3


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Captioned pictures of 48 x 32 pixels: cut, but never scaled."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write_pictures(tmp_path / "data", 7, size=(48, 32))
    rows = [{"file_name": f"picture-{i}.png", "text": f"a disc, the {i}th"} for i in range(7)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("prediction", "snr_gamma", "noise_offset"), [("epsilon", None, 0.0), ("v_prediction", 5.0, 0.1)]
)
@pytest.mark.slow
def test_first_20_losses_of_lora_equal_diffusers_loop(tmp_path, data, prediction, snr_gamma, noise_offset):
    base = tiny_sd_pipeline(tmp_path / "base", vae="kl", prediction_type=prediction, scheduler="pndm")
    settings = {"snr_gamma": snr_gamma, "noise_offset": noise_offset}
    ours, start, draws, timesteps = _our_losses(base, data, **settings)
    theirs = _their_losses(base, data, start, draws, timesteps, **settings)
    assert ours == pytest.approx(theirs, rel=0, abs=1e-6)
    assert theirs[0] != pytest.approx(theirs[-1], abs=1e-4)


def _our_losses(base, data, *, snr_gamma, noise_offset):
    """Losses, the adapter's starting factors, and the draws and timesteps of each step."""
    model = load_base(str(base))
    cut = {"resolution": 32, "center_crop": True, "random_flip": True}
    batches = Batches(model, read_captioned_folder(data), seed=SEED, noise_offset=noise_offset, **cut)
    adapter = da.attach(model.pipe, da.make_method("lora", rank=4), targets="attention", seed=1)
    start = {name: value.detach().clone() for name, value in adapter.parts[0].named_tensors().items()}
    places = [range(step * BATCH, (step + 1) * BATCH) for step in range(STEPS)]
    draws = [batches.order.sample_indices(some) for some in places]
    timesteps = [batches.batch(some).timesteps for some in places]
    options = train_options(max_train_steps=STEPS, train_batch_size=BATCH, learning_rate=RATE)
    told = {"predict": model.predict, "schedule": model.training_schedule(), "snr_gamma": snr_gamma}
    train_state = initial_state(Accelerator(cpu=True), Objective(model.denoiser, adapter, **told), options)
    return [step.loss for step in train(train_state, batches)], start, draws, timesteps


def _their_losses(base, data, start, draws, timesteps, *, snr_gamma, noise_offset):
    """The example's loop on the whole pipeline and a data set of `datasets`."""
    pipe = StableDiffusionPipeline.from_pretrained(base)
    unet, vae, text_encoder, tokenizer = pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer
    noise_scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    for model in (unet, vae, text_encoder):
        model.requires_grad_(False)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
    for name, value in start.items():
        layer = unet.get_submodule(name.split("/")[1].removeprefix("unet."))
        side = layer.lora_A if name.endswith("down") else layer.lora_B
        side["default"].weight.data.copy_(value)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    dataset = datasets.load_dataset("imagefolder", data_dir=str(data))["train"]
    rows = {row["text"]: row["image"].convert("RGB") for row in dataset}
    captions = sorted(rows)
    crop = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32)])
    normalize = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
    unet.train()
    losses = []
    for chosen, steps in zip(draws, timesteps, strict=True):
        keys = [(SEED, d.role, d.epoch, d.sample) for d in chosen]
        pictures = [crop(rows[captions[d.index]]) for d in chosen]
        mirrored = [uniform(("flip", *key), 1)[0] < 0.5 for key in keys]
        pixels = [
            normalize(transforms.functional.hflip(image) if flip else image)
            for image, flip in zip(pictures, mirrored, strict=True)
        ]
        with torch.no_grad():
            moments = vae.encode(torch.stack(pixels)).latent_dist
            shape = moments.mean.shape[1:]
            posterior = torch.stack([normal(("posterior", *key), shape) for key in keys])
            latents = (moments.mean + moments.std * posterior) * vae.config.scaling_factor
            tokens = tokenizer(
                [captions[d.index] for d in chosen],
                max_length=tokenizer.model_max_length,
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            )
            encoder_hidden_states = text_encoder(tokens.input_ids, return_dict=False)[0]
        noise = torch.stack([normal(("noise", *key), shape) for key in keys])
        if noise_offset:
            offsets = torch.stack([normal(("noise_offset", *key), (shape[0], 1, 1)) for key in keys])
            noise += noise_offset * offsets
        noisy = noise_scheduler.add_noise(latents, noise, steps)
        kind = noise_scheduler.config.prediction_type
        target = noise if kind == "epsilon" else noise_scheduler.get_velocity(latents, noise, steps)
        model_pred = unet(noisy, steps, encoder_hidden_states, return_dict=False)[0]
        if snr_gamma is None:
            loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
        else:
            snr = compute_snr(noise_scheduler, steps)
            weights = torch.stack([snr, snr_gamma * torch.ones_like(steps)], dim=1).min(dim=1)[0]
            weights = weights / snr if kind == "epsilon" else weights / (snr + 1)
            loss = F.mse_loss(model_pred.float(), target.float(), reduction="none")
            loss = (loss.mean(dim=list(range(1, len(loss.shape)))) * weights).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
