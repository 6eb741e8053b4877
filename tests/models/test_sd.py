"""The Stable Diffusion family: what is encoded, predicted and refused."""

import json

import pytest
import torch
from helpers.pipelines import tiny_sd_pipeline, write_pictures

from diffadapt.common.images import list_images, open_image, to_pixels
from diffadapt.models.families import load_base
from diffadapt.models.prompts import EMOJI_CONTEXTS, context_prompts, subject_of, without_identifier


@pytest.mark.parametrize("vae", ["kl", "tiny"])
@pytest.mark.parametrize("scheduler", ["pndm", "ddim", "ddpm"])
@pytest.mark.slow
def test_a_base_loads_with_every_autoencoder_and_scheduler(tmp_path, vae, scheduler):
    model = load_base(str(tiny_sd_pipeline(tmp_path, vae=vae, scheduler=scheduler)))
    assert model.family == "sd"
    assert model.resolution == 32
    assert model.is_stochastic == (vae == "kl")
    assert not any(p.requires_grad for p in model.denoiser.parameters())
    assert model.training_schedule().config.num_train_timesteps == 1000


def test_encoded_pictures_are_the_moments_of_the_autoencoder(tmp_path):
    model = load_base(str(tiny_sd_pipeline(tmp_path / "base", vae="kl")))
    pixels = torch.stack(
        [to_pixels(open_image(p), 32) for p in list_images(write_pictures(tmp_path / "a", 2))]
    )
    encoded, posterior = model.encode_images(pixels), model.pipe.vae.encode(pixels).latent_dist
    noise = torch.randn(posterior.mean.shape)
    expected = (posterior.mean + posterior.std * noise) * model.pipe.vae.config.scaling_factor
    assert torch.allclose(model.sample_latents(encoded, noise), expected, atol=1e-6)


@pytest.mark.slow
def test_prompts_become_the_states_the_pipeline_uses(tmp_path):
    model = load_base(str(tiny_sd_pipeline(tmp_path)))
    expected, _ = model.pipe.encode_prompt("a dog", "cpu", 1, False)
    assert torch.allclose(model.encode_captions(["a dog"])["encoder_hidden_states"], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_target_follows_the_schedule(tmp_path, kind):
    schedule = load_base(str(tiny_sd_pipeline(tmp_path, prediction_type=kind))).training_schedule()
    latents, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    alpha = schedule.alphas_cumprod[t].view(2, 1, 1, 1)
    expected = {
        "epsilon": noise,
        "v_prediction": alpha**0.5 * noise - (1 - alpha) ** 0.5 * latents,
        "sample": latents,
    }
    assert torch.allclose(schedule.target(latents, noise, t), expected[kind], atol=1e-6)


def test_wrong_bases_are_errors_with_a_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="no base model at"):
        load_base(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"no model_index.json"):
        load_base(str(tmp_path))
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "HunyuanDiTPipeline"}), encoding="utf-8"
    )
    with pytest.raises(
        ValueError, match="is a HunyuanDiTPipeline; the known kinds are StableDiffusionPipeline"
    ):
        load_base(str(tmp_path))
    with pytest.raises(ValueError, match=r"did you mean|embedded"):
        load_base("embedded:emojy")


def test_context_prompts_speak_of_the_subject():
    assert subject_of("a photo of sks dog") == subject_of("photo of a sks dog") == "sks dog"
    assert subject_of("a sks cat face emoji") == "sks cat face"
    assert all("sks cat face" in prompt for prompt in context_prompts(EMOJI_CONTEXTS, "a sks cat face emoji"))
    words = without_identifier(
        "a sks dog on a beach", instance_prompt="a photo of sks dog", class_prompt="a photo of a dog"
    )
    assert words == "a dog on a beach"
