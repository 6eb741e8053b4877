"""Flow matching gives the losses of diffusers' `train_dreambooth_lora_*.py`, restated here with PEFT.

The examples are those of Stable Diffusion 3, FLUX.1, FLUX.2 klein, Qwen-Image and Z-Image, with a caption of
its own for every image. Where an example is wrong, or has another default, a test shows the difference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    QwenImagePipeline,
    ZImageTransformer2DModel,
)
from helpers.family_pipelines import tiny_folder
from helpers.pipelines import train_options, write_pictures
from peft import LoraConfig
from torch import Tensor

import diffadapt as da
from diffadapt.common.images import list_images, open_image, to_pixels
from diffadapt.common.keyed_random import normal
from diffadapt.data.batches import Batches
from diffadapt.data.examples import Example
from diffadapt.models.families import load_base
from diffadapt.models.noise_schedule import TimestepSampling
from diffadapt.training.loop import initial_state, train
from diffadapt.training.objective import Objective

STEPS, BATCH, RATE, SIDE, SEED = 20, 2, 1e-3, 64, 3
CAPTIONS = ("a photo of sks dog", "a sks dog", "sks dog on a very long red sofa, in the evening")

ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
JOINT_ATTENTION = (
    *("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"),
    *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
)
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


@dataclass(frozen=True)
class ExampleScript:
    """What differs between the examples.

    Attributes:
        layers: the default of `--lora_layers`.
        encode: captions -> the transformer's arguments about them.
        latents: (pixels, posterior noise) -> latents at the transformer's scale.
        predict: (noisy latents, timesteps 0..1000, arguments about the captions) -> velocity.
    """

    layers: tuple[str, ...]
    encode: Callable[[DiffusionPipeline, list[str]], dict[str, object]]
    latents: Callable[[torch.nn.Module, Tensor, Tensor | None], Tensor]
    predict: Callable[[DiffusionPipeline, Tensor, Tensor, dict[str, object]], Tensor]


def _sample(vae: AutoencoderKL, pixels: Tensor, posterior: Tensor) -> Tensor:
    distribution = vae.encode(pixels).latent_dist
    latents = distribution.mean + distribution.std * posterior
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def _encode_sd3(pipe, captions, max_sequence_length=256):
    """Both CLIPs side by side, padded to the width of T5, then T5."""
    states = []
    pooled = []
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        ids = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        output = encoder(ids.input_ids, output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled.append(output[0])
    t5 = _t5_states(pipe.tokenizer_3, pipe.text_encoder_3, captions, max_sequence_length)
    clip = torch.cat(states, dim=-1)
    clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    return {
        "encoder_hidden_states": torch.cat([clip, t5], dim=-2),
        "pooled_projections": torch.cat(pooled, dim=-1),
    }


def _t5_states(tokenizer, encoder, captions, length):
    ids = tokenizer(
        captions,
        padding="max_length",
        max_length=length,
        truncation=True,
        add_special_tokens=True,
        return_tensors="pt",
    )
    return encoder(ids.input_ids)[0]


def _predict_sd3(pipe, noisy, timesteps, text):
    return pipe.transformer(hidden_states=noisy, timestep=timesteps, return_dict=False, **text)[0]


def _encode_flux(pipe, captions):
    ids = pipe.tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    states = _t5_states(pipe.tokenizer_2, pipe.text_encoder_2, captions, 512)
    return {
        "pooled_projections": pipe.text_encoder(ids.input_ids).pooler_output,
        "encoder_hidden_states": states,
        "txt_ids": torch.zeros(states.shape[1], 3),
    }


def _predict_flux(pipe, noisy, timesteps, text, guidance_scale=1.0):
    batch_size, channels, height, width = noisy.shape
    output = pipe.transformer(
        hidden_states=FluxPipeline._pack_latents(noisy, batch_size, channels, height, width),
        timestep=timesteps / 1000,
        guidance=torch.tensor([guidance_scale]).expand(batch_size),
        img_ids=FluxPipeline._prepare_latent_image_ids(
            batch_size, height // 2, width // 2, "cpu", noisy.dtype
        ),
        return_dict=False,
        **text,
    )[0]
    return FluxPipeline._unpack_latents(output, height=height * 8, width=width * 8, vae_scale_factor=8)


def _klein_latents(vae, pixels, posterior):
    latents = Flux2KleinPipeline._patchify_latents(vae.encode(pixels).latent_dist.mode())
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    deviation = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    return (latents - mean) / deviation


def _encode_klein(pipe, captions, layers=(9, 18, 27)):
    states, ids = pipe.encode_prompt(prompt=captions, max_sequence_length=512, text_encoder_out_layers=layers)
    return {"encoder_hidden_states": states, "txt_ids": ids}


def _predict_klein(pipe, noisy, timesteps, text):
    ids = Flux2KleinPipeline._prepare_latent_ids(noisy)
    output = pipe.transformer(
        hidden_states=Flux2KleinPipeline._pack_latents(noisy),
        timestep=timesteps / 1000,
        guidance=None,
        img_ids=ids,
        return_dict=False,
        **text,
    )[0]
    return Flux2KleinPipeline._unpack_latents_with_ids(output, ids)


def _qwen_latents(vae, pixels, posterior):
    distribution = vae.encode(pixels.unsqueeze(2)).latent_dist
    latents = distribution.mean + distribution.std * posterior.unsqueeze(2)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    factor = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return ((latents - mean) * factor)[:, :, 0]


def _encode_qwen(pipe, captions):
    states, mask = pipe.encode_prompt(prompt=captions, max_sequence_length=512)
    return {"encoder_hidden_states": states, "encoder_hidden_states_mask": mask}


def _predict_qwen(pipe, noisy, timesteps, text):
    batch_size, channels, height, width = noisy.shape
    video = noisy.unsqueeze(2).permute(0, 2, 1, 3, 4)
    output = pipe.transformer(
        hidden_states=QwenImagePipeline._pack_latents(video, batch_size, channels, height, width),
        timestep=timesteps / 1000,
        img_shapes=[[(1, height // 2, width // 2)]] * batch_size,
        return_dict=False,
        **text,
    )[0]
    return QwenImagePipeline._unpack_latents(output, height * 8, width * 8, 8)[:, :, 0]


def _z_image_latents(vae, pixels, posterior):
    latents = vae.encode(pixels).latent_dist.mode()
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def _encode_z_image(pipe, captions):
    states, _ = pipe.encode_prompt(prompt=captions, max_sequence_length=512)
    return {"cap_feats": states}


def _predict_z_image(pipe, noisy, timesteps, text):
    images = list(noisy.unsqueeze(2).unbind(dim=0))
    output = pipe.transformer(images, (1000 - timesteps) / 1000, text["cap_feats"], return_dict=False)[0]
    return -torch.stack(output, dim=0).squeeze(2)


EXAMPLES = {
    "sd3": ExampleScript(JOINT_ATTENTION, _encode_sd3, _sample, _predict_sd3),
    "flux": ExampleScript(JOINT_ATTENTION + FEED_FORWARD, _encode_flux, _sample, _predict_flux),
    "flux2_klein": ExampleScript(
        # The last one's names are `single_transformer_blocks.0.attn.to_out` and so on.
        (*ATTENTION, "to_qkv_mlp_proj", "single_transformer_blocks.0.attn.to_out"),
        _encode_klein,
        _klein_latents,
        _predict_klein,
    ),
    "qwen_image": ExampleScript(ATTENTION, _encode_qwen, _qwen_latents, _predict_qwen),
    "z_image": ExampleScript(ATTENTION, _encode_z_image, _z_image_latents, _predict_z_image),
}


@dataclass(frozen=True)
class OurRun:
    """A run of the loop: its losses, and what an example needs to repeat it."""

    losses: list[float]
    start: dict[str, Tensor]
    examples: list[list[Example]]
    posteriors: list[Tensor | None]
    noises: list[Tensor]
    levels: list[Tensor]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    paths = list_images(write_pictures(tmp_path_factory.mktemp("pictures"), len(CAPTIONS), size=(SIDE, SIDE)))
    return [Example(path, caption) for path, caption in zip(paths, CAPTIONS, strict=True)]


def our_run(folder, family, data, *, steps=STEPS, batch_size=BATCH) -> OurRun:
    model = load_base(str(folder))
    batches = Batches(model, data, resolution=SIDE, center_crop=True, seed=SEED)
    adapter = da.attach(model.pipe, da.make_method("lora", rank=4), targets=EXAMPLES[family].layers, seed=1)
    start = {name: value.detach().clone() for name, value in adapter.parts[0].named_tensors().items()}
    examples = []
    posteriors = []
    noises = []
    levels = []
    for step in range(steps):
        positions = range(step * batch_size, (step + 1) * batch_size)
        batch = batches.batch(positions)
        samples = batches.order.sample_indices(positions)
        posterior = None
        if model.is_stochastic:
            rows = [
                normal(("posterior", SEED, s.role, s.epoch, s.sample), batch.latents.shape[1:])
                for s in samples
            ]
            posterior = torch.stack(rows)
        examples.append(batches.examples(positions))
        posteriors.append(posterior)
        noises.append(batch.noise)
        levels.append(batch.timesteps)
    options = train_options(max_train_steps=steps, train_batch_size=batch_size, learning_rate=RATE)
    objective = Objective(model.denoiser, adapter, predict=model.predict, schedule=model.training_schedule())
    train_state = initial_state(Accelerator(cpu=True), objective, options)
    losses = [step.loss for step in train(train_state, batches)]
    return OurRun(losses, start, examples, posteriors, noises, levels)


def example_losses(
    folder, family, ours: OurRun, *, encode=None, predict=None, precondition_outputs=False
) -> list[float]:
    """The example's loop: the pipeline loaded anew, images and captions encoded in every step."""
    script = EXAMPLES[family]
    encode = encode or script.encode
    predict = predict or script.predict
    pipe = DiffusionPipeline.from_pretrained(folder)
    transformer = pipe.transformer
    for module in (transformer, pipe.vae):
        module.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=list(script.layers))
    )
    _copy_start(transformer, ours.start)
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    losses = []
    steps = zip(ours.examples, ours.posteriors, ours.noises, ours.levels, strict=True)
    for examples, posterior, noise, levels in steps:
        pixels = torch.stack([to_pixels(open_image(example.source), SIDE) for example in examples])
        with torch.no_grad():
            model_input = script.latents(pipe.vae, pixels, posterior)
            text = encode(pipe, [example.caption for example in examples])
        sigmas = levels.view(-1, 1, 1, 1)
        noisy = (1.0 - sigmas) * model_input + sigmas * noise
        prediction = predict(pipe, noisy, levels * 1000, text)
        target = noise - model_input
        if precondition_outputs:
            prediction = prediction * (-sigmas) + noisy
            target = model_input
        loss = (prediction.float() - target.float()).square().reshape(len(target), -1).mean(1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _copy_start(transformer, start):
    """PEFT's A and B from our down and up."""
    for name, value in start.items():
        _, site, factor = name.split("/")
        layer = transformer.get_submodule(site.removeprefix("transformer."))
        side = layer.lora_A if factor == "down" else layer.lora_B
        with torch.no_grad():
            side["default"].weight.copy_(value)


@pytest.mark.parametrize("family", EXAMPLES)
@pytest.mark.slow
def test_first_20_losses_of_lora_equal_the_examples_loop(family, data, tmp_path_factory):
    folder = tiny_folder(family, tmp_path_factory)
    ours = our_run(folder, family, data)
    theirs = example_losses(folder, family, ours)
    assert ours.losses == pytest.approx(theirs, rel=0, abs=1e-6)
    assert theirs[0] != pytest.approx(theirs[-1], abs=1e-4)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        # The example reads 77 tokens of T5 by default; the base was trained on 256, which its pipeline reads.
        ("sd3", {"encode": partial(_encode_sd3, max_sequence_length=77)}),
        # The example trains FLUX.1-dev's guidance input at 3.5 by default; 1 stands for no guidance.
        ("flux", {"predict": partial(_predict_flux, guidance_scale=3.5)}),
        # The example reads the hidden layers of FLUX.2-dev by default; klein's pipeline reads 9, 18 and 27.
        ("flux2_klein", {"encode": partial(_encode_klein, layers=(10, 20, 30))}),
    ],
)
@pytest.mark.slow
def test_defaults_of_examples_that_do_not_fit_the_base_give_other_losses(
    family, changes, data, tmp_path_factory
):
    folder = tiny_folder(family, tmp_path_factory)
    ours = our_run(folder, family, data, steps=1)
    assert ours.losses == pytest.approx(example_losses(folder, family, ours), abs=1e-6)
    (theirs,) = example_losses(folder, family, ours, **changes)
    assert abs(theirs - ours.losses[0]) > 1e-5


def test_preconditioned_outputs_weight_the_loss_of_sd3_by_the_squared_noise_level(data, tmp_path_factory):
    folder = tiny_folder("sd3", tmp_path_factory)
    ours = our_run(folder, "sd3", data, steps=1, batch_size=1)
    (theirs,) = example_losses(folder, "sd3", ours, precondition_outputs=True)
    level = float(ours.levels[0])
    # |x_s - s v - x|^2 = s^2 |v - (noise - x)|^2
    assert theirs == pytest.approx(level**2 * ours.losses[0], rel=1e-5)


def test_z_image_reads_one_caption_per_image_in_every_step(data, tmp_path_factory, monkeypatch):
    """With one prompt for all images the example repeats its own list: 2, 4, 8, ... captions at batch 2."""
    folder = tiny_folder("z_image", tmp_path_factory)
    forward = ZImageTransformer2DModel.forward
    counts = []

    def count_captions(transformer, images, timesteps, captions, *arguments, **options):
        counts.append((len(images), len(captions)))
        return forward(transformer, images, timesteps, captions, *arguments, **options)

    monkeypatch.setattr(ZImageTransformer2DModel, "forward", count_captions)
    our_run(folder, "z_image", data, steps=3)
    assert counts == [(2, 2), (2, 2), (2, 2)]


def test_noisy_latents_are_mixed_in_float32(data, tmp_path_factory):
    """The examples mix in the precision of the weights, in which a noise level has three digits."""
    base = load_base(str(tiny_folder("sd3", tmp_path_factory)), dtype=torch.bfloat16)
    batch = Batches(base, data, resolution=SIDE, center_crop=True, seed=SEED).batch([0, 1])
    noisy = base.training_schedule().add_noise(batch.latents, batch.noise, batch.timesteps)
    level = batch.timesteps.double().view(-1, 1, 1, 1)
    exact = (1 - level) * batch.latents.double() + level * batch.noise.double()
    sigmas = batch.timesteps.bfloat16().view(-1, 1, 1, 1)
    theirs = (1.0 - sigmas) * batch.latents.bfloat16() + sigmas * batch.noise.bfloat16()
    assert (noisy - exact).abs().max() < 1e-6
    assert (theirs - exact).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("family", "scheme", "sampling"),
    [
        ("sd3", "logit_normal", TimestepSampling()),
        # Samplers shift the times of these by the size of the image; the examples train unshifted.
        ("flux", "none", TimestepSampling("uniform", 1.0)),
        ("flux2_klein", "none", TimestepSampling("uniform", 1.0)),
        ("qwen_image", "none", TimestepSampling("uniform", 1.0)),
        ("z_image", "none", TimestepSampling("uniform")),
    ],
)
def test_times_are_those_of_the_examples_table(family, scheme, sampling, tmp_path_factory, monkeypatch):
    """The examples round times to a table of 1000; `none` is uniform, their default but in SD3."""
    model = load_base(str(tiny_folder(family, tmp_path_factory)))
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(model.pipe.scheduler.config)
    count = scheduler.config.num_train_timesteps
    uniforms = torch.linspace(0.002, 0.998, 250, dtype=torch.float64)
    values = iter(uniforms.tolist())
    monkeypatch.setattr("diffadapt.models.flow_schedule.uniform", lambda key, count: [next(values)])
    levels = model.training_schedule(sampling).sample_timesteps([()] * 250, torch.zeros(1, 16, 8, 8))
    # Their table falls from noise, so their random number is one minus ours.
    u = 1 - uniforms
    if scheme == "logit_normal":
        u = torch.sigmoid(torch.distributions.Normal(0.0, 1.0).icdf(u))
    indices = (u * count).long()
    sigmas = scheduler.sigmas[indices]
    step = (scheduler.sigmas[:-2] - scheduler.sigmas[1:-1]).max()
    assert (levels - sigmas).abs().max() <= step
