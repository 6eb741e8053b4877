"""The loop gives the losses of diffusers' `train_dreambooth_lora.py`, restated here with PEFT."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
from helpers.pipelines import tiny_sd_pipeline, train_options, write_pictures
from peft import LoraConfig

import diffadapt as da
from diffadapt.common.images import open_image, to_pixels
from diffadapt.common.keyed_random import normal
from diffadapt.data.batches import Batches
from diffadapt.data.examples import folder_examples
from diffadapt.models.families import load_base
from diffadapt.training.loop import initial_state, train
from diffadapt.training.objective import Objective

STEPS, BATCH, RATE, PROMPT, CLASS = 20, 2, 1e-3, "a photo of sks dog", "a photo of a dog"


@pytest.mark.parametrize(
    ("prediction", "vae", "prior"),
    [
        ("epsilon", "kl", False),
        ("v_prediction", "kl", True),
        ("epsilon", "tiny", True),
        ("v_prediction", "tiny", False),
    ],
)
@pytest.mark.slow
def test_first_20_losses_of_lora_equal_diffusers_loop(tmp_path, prediction, vae, prior):
    base = tiny_sd_pipeline(tmp_path / "base", vae=vae, prediction_type=prediction, scheduler="pndm")
    instances = folder_examples(write_pictures(tmp_path / "mine", 5), PROMPT)
    classes = folder_examples(write_pictures(tmp_path / "class", 7), CLASS) if prior else []
    ours, start, draws = _our_losses(base, instances, classes)
    theirs = _their_losses(base, start, draws, instances, classes)
    assert ours == pytest.approx(theirs, rel=0, abs=1e-6)
    assert theirs[0] != pytest.approx(theirs[-1], abs=1e-4)


def _our_losses(base, instances, classes):
    """Losses, the adapter's starting factors by site, and what was drawn for each step."""
    model = load_base(str(base))
    batches = Batches(model, instances, classes=classes, resolution=32, center_crop=True, seed=3)
    adapter = da.attach(model.pipe, da.make_method("lora", rank=4), targets="attention", seed=1)
    start = {name: value.detach().clone() for name, value in adapter.parts[0].named_tensors().items()}
    draws = []
    for step in range(STEPS):
        batch = batches.batch(range(step * BATCH, (step + 1) * BATCH))
        draws.append(
            (
                batches.order.sample_indices(range(step * BATCH, (step + 1) * BATCH)),
                batch.noise,
                batch.timesteps,
            )
        )
    options = train_options(max_train_steps=STEPS, train_batch_size=BATCH, learning_rate=RATE)
    objective = Objective(
        model.denoiser,
        adapter,
        predict=model.predict,
        schedule=model.training_schedule(),
        prior_weight=0.7 if classes else None,
    )
    train_state = initial_state(Accelerator(cpu=True), objective, options)
    return [step.loss for step in train(train_state, batches)], start, draws


def _their_losses(base, start, draws, instances, classes):
    """The example's loop: the whole pipeline reloaded, every picture encoded in every step."""
    pipe = StableDiffusionPipeline.from_pretrained(base)
    unet, vae, text_encoder, tokenizer = pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer
    noise_scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    for model in (unet, vae, text_encoder):
        model.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(
            r=4,
            lora_alpha=4,
            init_lora_weights="gaussian",
            target_modules=["to_k", "to_q", "to_v", "to_out.0"],
        )
    )
    _copy_start(unet, start)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    unet.train()
    losses = []
    for chosen, noise, timesteps in draws:
        pictures = [{"instance": instances, "class": classes}[d.role][d.index] for d in chosen]
        pixels = torch.stack([to_pixels(open_image(p.source), 32) for p in pictures])
        with torch.no_grad():
            if isinstance(vae, AutoencoderKL):
                posterior = torch.stack(
                    [normal(("posterior", 3, d.role, d.epoch, d.sample), noise.shape[1:]) for d in chosen]
                )
                moments = vae.encode(pixels).latent_dist
                model_input = (moments.mean + moments.std * posterior) * vae.config.scaling_factor
            else:
                model_input = vae.encode(pixels).latents * vae.config.scaling_factor
            tokens = tokenizer(
                [p.caption for p in pictures],
                truncation=True,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                return_tensors="pt",
            )
            encoder_hidden_states = text_encoder(tokens.input_ids, return_dict=False)[0]
        noisy = noise_scheduler.add_noise(model_input, noise, timesteps)
        model_pred = unet(noisy, timesteps, encoder_hidden_states).sample
        if noise_scheduler.config.prediction_type == "epsilon":
            target = noise
        else:
            target = noise_scheduler.get_velocity(model_input, noise, timesteps)
        if classes:
            model_pred, model_pred_prior = torch.chunk(model_pred, 2, dim=0)
            target, target_prior = torch.chunk(target, 2, dim=0)
            loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
            loss = loss + 0.7 * F.mse_loss(model_pred_prior.float(), target_prior.float(), reduction="mean")
        else:
            loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(itertools.chain(parameters), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _copy_start(unet, start):
    """PEFT's A and B from our down and up."""
    for name, value in start.items():
        _, site, factor = name.split("/")
        layer = unet.get_submodule(site.removeprefix("unet."))
        side = layer.lora_A if factor == "down" else layer.lora_B
        with torch.no_grad():
            side["default"].weight.copy_(value)
