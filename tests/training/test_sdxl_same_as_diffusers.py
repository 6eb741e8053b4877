"""The loop gives the losses of diffusers' `train_dreambooth_lora_sdxl.py`, restated here with PEFT.

Pictures are wider than high, so that sizes and crops count; with text encoders trained and not.
"""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from helpers.pipelines import tiny_sdxl_pipeline, train_options, write_pictures
from peft import LoraConfig
from PIL import Image

import diffadapt as da
from diffadapt.common.images import open_image, to_pixels
from diffadapt.common.keyed_random import normal
from diffadapt.data.batches import Batches
from diffadapt.data.examples import folder_examples
from diffadapt.models.families import load_base
from diffadapt.training.loop import initial_state, train
from diffadapt.training.objective import Objective

STEPS, BATCH, RATE, SIDE = 20, 2, 1e-3, 32
PROMPT, CLASS, PRIOR_WEIGHT = "a photo of sks dog", "a photo of a dog", 0.7
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


@pytest.mark.parametrize(
    ("prediction", "prior", "with_text"),
    [("epsilon", True, False), ("v_prediction", False, True)],
)
@pytest.mark.slow
def test_first_20_losses_of_lora_equal_diffusers_sdxl_loop(tmp_path, prediction, prior, with_text):
    base = tiny_sdxl_pipeline(tmp_path / "base", vae="kl", prediction_type=prediction)
    instances = folder_examples(write_pictures(tmp_path / "mine", 5, size=(50, 40)), PROMPT)
    classes = folder_examples(write_pictures(tmp_path / "class", 7, size=(40, 44)), CLASS) if prior else []
    ours, start, draws = _our_losses(base, instances, classes, with_text)
    theirs = _their_losses(base, start, draws, instances, classes, with_text)
    assert ours == pytest.approx(theirs, rel=0, abs=1e-6)
    assert theirs[0] != pytest.approx(theirs[-1], abs=1e-4)


def _our_losses(base, instances, classes, with_text):
    """Losses, the adapter's starting factors by site, and what was drawn for each step."""
    model = load_base(str(base))
    model.train_text_encoder = with_text
    batches = Batches(model, instances, classes=classes, resolution=SIDE, center_crop=True, seed=3)
    text = "attention" if with_text else None
    method = da.make_method("lora", rank=4)
    adapter = da.attach(model.pipe, method, targets="attention", text_encoder_targets=text, seed=1)
    start = {name: value.detach().clone() for name, value in adapter.parts[0].named_tensors().items()}
    draws = []
    for step in range(STEPS):
        positions = range(step * BATCH, (step + 1) * BATCH)
        batch = batches.batch(positions)
        draws.append((batches.order.sample_indices(positions), batch.noise, batch.timesteps))
    options = train_options(max_train_steps=STEPS, train_batch_size=BATCH, learning_rate=RATE)
    objective = Objective(
        model.denoiser,
        adapter,
        predict=model.predict,
        schedule=model.training_schedule(),
        prior_weight=PRIOR_WEIGHT if classes else None,
    )
    train_state = initial_state(Accelerator(cpu=True), objective, options)
    return [step.loss for step in train(train_state, batches)], start, draws


def _their_losses(base, start, draws, instances, classes, with_text):
    """The example's loop: the whole pipeline reloaded, every picture and prompt encoded in every step."""
    pipe = StableDiffusionXLPipeline.from_pretrained(base)
    noise_scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    text_encoders, tokenizers = [pipe.text_encoder, pipe.text_encoder_2], [pipe.tokenizer, pipe.tokenizer_2]
    for model in (pipe.unet, pipe.vae, *text_encoders):
        model.requires_grad_(False)
    pipe.unet.add_adapter(_lora(["to_k", "to_q", "to_v", "to_out.0"]))
    for text_encoder in text_encoders if with_text else ():
        text_encoder.add_adapter(_lora(TEXT_TARGETS))
    _copy_start(pipe, start)
    modules = (pipe.unet, *text_encoders)
    parameters = [p for model in modules for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    pipe.unet.train()
    losses = []
    for chosen, noise, timesteps in draws:
        pictures = [{"instance": instances, "class": classes}[d.role][d.index] for d in chosen]
        posterior = torch.stack(
            [normal(("posterior", 3, d.role, d.epoch, d.sample), noise.shape[1:]) for d in chosen]
        )
        with torch.no_grad():
            pixels = torch.stack([to_pixels(open_image(p.source), SIDE) for p in pictures])
            moments = pipe.vae.encode(pixels).latent_dist
            model_input = (moments.mean + moments.std * posterior) * pipe.vae.config.scaling_factor
        with torch.set_grad_enabled(with_text):
            prompt_embeds, pooled = _encode_prompt(text_encoders, tokenizers, [p.caption for p in pictures])
        noisy = noise_scheduler.add_noise(model_input, noise, timesteps)
        added = {"time_ids": torch.cat([_time_ids(p.source) for p in pictures]), "text_embeds": pooled}
        model_pred = pipe.unet(noisy, timesteps, prompt_embeds, added_cond_kwargs=added).sample
        if noise_scheduler.config.prediction_type == "epsilon":
            target = noise
        else:
            target = noise_scheduler.get_velocity(model_input, noise, timesteps)
        if classes:
            model_pred, model_pred_prior = torch.chunk(model_pred, 2, dim=0)
            target, target_prior = torch.chunk(target, 2, dim=0)
            prior_loss = F.mse_loss(model_pred_prior.float(), target_prior.float(), reduction="mean")
        loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
        if classes:
            loss = loss + PRIOR_WEIGHT * prior_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _lora(targets):
    return LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets)


def _encode_prompt(text_encoders, tokenizers, prompts):
    states = []
    for text_encoder, tokenizer in zip(text_encoders, tokenizers, strict=True):
        tokens = tokenizer(
            prompts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        found = text_encoder(tokens.input_ids, output_hidden_states=True, return_dict=False)
        pooled = found[0]
        states.append(found[-1][-2])
    return torch.cat(states, dim=-1), pooled


def _time_ids(path):
    """Original size, crop and target size as the example computes them with torchvision's sizes."""
    with Image.open(path) as image:
        width, height = image.size
    short, long = min(width, height), max(width, height)
    resized = int(SIDE * long / short)
    offset = round((resized - SIDE) / 2.0)
    top, left = (0, offset) if width > height else (offset, 0)
    return torch.tensor([[height, width, top, left, SIDE, SIDE]], dtype=torch.float32)


def _copy_start(pipe, start):
    """PEFT's A and B from our down and up."""
    for name, value in start.items():
        _, site, factor = name.split("/")
        component, _, path = site.partition(".")
        layer = getattr(pipe, component).get_submodule(path)
        side = layer.lora_A if factor == "down" else layer.lora_B
        with torch.no_grad():
            side["default"].weight.copy_(value)
