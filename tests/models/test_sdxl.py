"""Stable Diffusion XL: states, pooled text, sizes, schedules, autoencoders as in the stock pipeline."""

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline
from helpers.pipelines import tiny_sdxl_pipeline, write_pictures

from diffadapt.common.images import CropGeometry, list_images, open_image, to_pixels
from diffadapt.models.families import load_base
from diffadapt.models.sampling import SamplingConfig, generate_all, image_requests

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_sdxl_pipeline(tmp_path_factory.mktemp("sdxl"), vae="kl")


@pytest.fixture(scope="module")
def model(base):
    return load_base(str(base))


def test_the_family_is_known_by_its_pipeline(model):
    assert (model.family, model.resolution) == ("sdxl", 32)
    assert not any(p.requires_grad for p in model.pipe.text_encoder_2.parameters())


def test_captions_become_what_the_stock_pipeline_makes_of_prompts(model):
    captions = ["a dog", "a red fox jumps"]
    states, _, pooled, _ = model.pipe.encode_prompt(captions, do_classifier_free_guidance=False)
    encoded = model.encode_captions(captions)
    assert torch.allclose(encoded["encoder_hidden_states"], states, atol=1e-5)
    assert torch.allclose(encoded["text_embeds"], pooled, atol=1e-5)
    assert states.shape[-1] == 32 + 24  # both encoders side by side


@pytest.mark.parametrize("force_zeros", [True, False])
def test_a_dropped_caption_is_what_sampling_uses_without_a_prompt(tmp_path, force_zeros):
    model = load_base(str(tiny_sdxl_pipeline(tmp_path, force_zeros=force_zeros)))
    _, negative, _, negative_pooled = model.pipe.encode_prompt("a dog", do_classifier_free_guidance=True)
    encoded = model.encode_captions([model.empty_caption, "a dog"])
    assert torch.allclose(encoded["encoder_hidden_states"][:1], negative, atol=1e-5)
    assert torch.allclose(encoded["text_embeds"][:1], negative_pooled, atol=1e-5)
    assert bool(encoded["encoder_hidden_states"][0].any()) is not force_zeros
    assert encoded["encoder_hidden_states"][1].any()


def test_sizes_are_told_as_the_stock_pipeline_tells_them(model):
    views = [
        CropGeometry(original_size=(480, 640), crop=(3, 16), size=(32, 24)),
        CropGeometry((32, 32), (0, 0), (32, 32)),
    ]
    told = model.size_conditions(views)["time_ids"]
    stock = model.pipe._get_add_time_ids((480, 640), (3, 16), (32, 24), torch.float32, 24)
    assert torch.equal(told[:1], stock)
    assert told.tolist()[1] == [32, 32, 0, 0, 32, 32]


def test_the_prediction_is_that_of_the_denoiser_called_by_hand(model):
    conditions = {
        **model.encode_captions(["a dog", "a cat"]),
        **model.size_conditions([CropGeometry((40, 40), (0, 0), (32, 32))] * 2),
    }
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    added = {"text_embeds": conditions["text_embeds"], "time_ids": conditions["time_ids"]}
    with torch.no_grad():
        expected = model.pipe.unet(
            noisy, timesteps, conditions["encoder_hidden_states"], added_cond_kwargs=added
        ).sample
        assert torch.equal(model.predict(model.denoiser, noisy, timesteps, conditions), expected)
        conditions["time_ids"] = conditions["time_ids"] + 100
        assert not torch.equal(model.predict(model.denoiser, noisy, timesteps, conditions), expected)


def test_images_are_those_of_the_stock_pipeline(base, model):
    stock = StableDiffusionXLPipeline.from_pretrained(base)
    stock.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    expected = stock(
        ["a dog"] * 2, num_inference_steps=3, guidance_scale=4.0, generator=generators, output_type="np"
    ).images
    sampler = SamplingConfig(num_inference_steps=3, guidance_scale=4.0)
    ours = generate_all(model.pipe, image_requests("a dog", 2, seed=5), sampler)
    assert torch.allclose(ours, torch.from_numpy(expected).permute(0, 3, 1, 2), atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_schedule_of_training_is_the_one_behind_an_euler_sampler(tmp_path, prediction):
    model = load_base(str(tiny_sdxl_pipeline(tmp_path, prediction_type=prediction)))
    schedule, stock = model.training_schedule(), DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    assert type(model.pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    assert torch.allclose(schedule.alphas_cumprod, stock.alphas_cumprod, atol=1e-7)
    assert schedule.config.prediction_type == prediction


def test_a_schedule_of_zero_terminal_signal_is_kept(model):
    stock = model.pipe.scheduler
    try:
        model.pipe.scheduler = type(stock).from_config(stock.config, rescale_betas_zero_snr=True)
        assert model.training_schedule().alphas_cumprod[-1] == 0
        model.pipe.scheduler = type(stock).from_config(stock.config)
        assert model.training_schedule().alphas_cumprod[-1] > 0
    finally:
        model.pipe.scheduler = stock


def test_continuous_schedules_are_refused(model):
    from diffusers import EDMEulerScheduler

    stock = model.pipe.scheduler
    try:
        model.pipe.scheduler = EDMEulerScheduler()
        with pytest.raises(ValueError, match="EDMEulerScheduler, which has no schedule of betas"):
            model.training_schedule()
    finally:
        model.pipe.scheduler = stock


def test_latents_with_statistics_per_channel_go_there_and_back(tmp_path, base):
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.5, 1.0])
    vae.save_pretrained(tmp_path / "other")
    model = load_base(str(base), vae=str(tmp_path / "other"))
    pixels = to_pixels(open_image(list_images(write_pictures(tmp_path / "a", 1))[0]), 32)[None]
    with torch.no_grad():
        moments = vae.encode(pixels).latent_dist
    noise, statistics = torch.randn(moments.mean.shape), (vae.config.latents_mean, vae.config.latents_std)
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in statistics)
    expected = (moments.mean + moments.std * noise - mean) * vae.config.scaling_factor / std
    assert torch.allclose(model.sample_latents(model.encode_images(pixels), noise), expected, atol=1e-6)
    ours = generate_all(model.pipe, image_requests("a dog", 1), SamplingConfig(num_inference_steps=2))
    generator = [torch.Generator().manual_seed(0)]
    stock = model.pipe(
        "a dog", num_inference_steps=2, guidance_scale=7.5, generator=generator, output_type="np"
    )
    assert torch.allclose(ours, torch.from_numpy(stock.images).permute(0, 3, 1, 2), atol=1e-5)


def test_the_autoencoder_stays_in_float32(base):
    model = load_base(str(base), dtype=torch.bfloat16)
    assert model.pipe.vae.dtype == torch.float32
    assert model.pipe.unet.dtype == model.pipe.text_encoder_2.dtype == torch.bfloat16
    assert model.encode_images(torch.zeros(1, 3, 32, 32)).dtype == torch.float32
    conditions = {
        **model.encode_captions(["a"]),
        **model.size_conditions([CropGeometry((40, 40), (0, 0), (32, 32))]),
    }
    predicted = model.predict(model.denoiser, torch.randn(1, 4, 8, 8), torch.tensor([3]), conditions)
    assert predicted.dtype == torch.bfloat16


def test_an_autoencoder_in_fp16_that_overflows_decodes_in_float32(base):
    model = load_base(str(base))
    seen = []
    model.pipe.vae.half()
    model.pipe.vae.register_to_config(force_upcast=True)
    hook = model.pipe.vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    generate_all(model.pipe, image_requests("a dog", 1), SamplingConfig(num_inference_steps=1))
    hook.remove()
    assert seen == [torch.float32]
    assert model.pipe.vae.dtype == torch.float16
