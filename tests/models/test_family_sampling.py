"""Images of the transformer families: those of the stock pipeline, in any batch size."""

import pytest
import torch
from helpers.family_pipelines import FAMILIES, tiny_folder

from diffadapt.models.families import load_base, sampling_defaults
from diffadapt.models.krea2 import Krea2
from diffadapt.models.sampling import ImageRequest, SamplingConfig, generate, generate_all, truncated_prompts

pytestmark = pytest.mark.slow

PROMPTS = ["a dog", "a much longer prompt of a cat"]
GUIDANCE = {"z_image": 3.0, "krea2": 3.0}  # on above 0; elsewhere above 1
STOCK_ARGUMENTS = {  # family -> how its pipeline's own call says guidance
    "qwen_image": {"true_cfg_scale": 4.0, "negative_prompt": " "},
    "pixart_sigma": {"guidance_scale": 4.0, "negative_prompt": "", "use_resolution_binning": False},
}


def stock_images(pipe, family, height, width):
    images = []
    for seed, prompt in enumerate(PROMPTS):
        arguments = STOCK_ARGUMENTS.get(family, {"guidance_scale": 4.0})
        output = pipe(
            prompt=prompt,
            num_inference_steps=2,
            height=height,
            width=width,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
            **arguments,
        )
        images.append(output.images)
    return torch.cat(images)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_the_stock_pipelines_own_in_any_batch_size(family, tmp_path_factory):
    pipe = load_base(str(tiny_folder(family, tmp_path_factory))).pipe
    requests = [ImageRequest(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    config = SamplingConfig(num_inference_steps=2, guidance_scale=4.0, height=64, width=96, batch_size=2)
    together = generate_all(pipe, requests, config)
    assert together.shape == (2, 3, 64, 96)
    assert together.dtype == torch.float32
    assert (together - stock_images(pipe, family, 64, 96)).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_has_defaults_to_sample_with(family, tmp_path_factory):
    folder = str(tiny_folder(family, tmp_path_factory))
    defaults = sampling_defaults(folder)
    assert defaults["num_inference_steps"] >= 20
    assert defaults["guidance_scale"] >= 3.5


def test_without_a_size_the_pipeline_takes_its_own():
    arguments = Krea2.pipeline_arguments([ImageRequest("a dog", 0)], SamplingConfig(height=64))
    assert arguments["height"] == 64
    assert "width" not in arguments


@pytest.mark.parametrize("family", [family for family in FAMILIES if "_t5" not in family])
def test_a_size_that_the_pipeline_would_round_is_refused(family, tmp_path_factory):
    pipe = load_base(str(tiny_folder(family, tmp_path_factory))).pipe
    for size in ({"height": 72, "width": 64}, {"height": 64, "width": 72}):
        config = SamplingConfig(num_inference_steps=1, **size)
        with pytest.raises(ValueError, match=r"72: .*Pipeline generates .* multiples of 16, such as 64"):
            next(generate(pipe, [ImageRequest("a dog", 0)], config))


@pytest.mark.parametrize("family", ["flux", "flux2_klein", "flux2_dev"])
def test_a_negative_prompt_is_refused_where_the_pipeline_has_none(family, tmp_path_factory):
    pipe = load_base(str(tiny_folder(family, tmp_path_factory))).pipe
    config = SamplingConfig(num_inference_steps=1, negative_prompt="blurry", height=64, width=64)
    with pytest.raises(ValueError, match=r"--negative_prompt: FLUX.* leave it out"):
        next(generate(pipe, [ImageRequest("a dog", 0)], config))


@pytest.mark.parametrize("family", ["sd3", "qwen_image", "z_image", "krea2", "chroma", "pixart_sigma"])
def test_a_negative_prompt_has_an_effect(family, tmp_path_factory):
    pipe = load_base(str(tiny_folder(family, tmp_path_factory))).pipe
    images = []
    for negative_prompt in (None, "blurry"):
        config = SamplingConfig(
            num_inference_steps=1, guidance_scale=4.0, negative_prompt=negative_prompt, height=64, width=64
        )
        images.append(generate_all(pipe, [ImageRequest("a dog", 0)], config))
    assert not torch.equal(*images)


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++", "unipc"])
def test_a_scheduler_of_betas_is_refused_by_a_flow_base(scheduler, tmp_path_factory):
    pipe = load_base(str(tiny_folder("sd3", tmp_path_factory))).pipe
    config = SamplingConfig(num_inference_steps=1, scheduler=scheduler, height=64, width=64)
    with pytest.raises(
        ValueError, match=f"--scheduler {scheduler.replace('+', '[+]')} does not fit this base"
    ):
        next(generate(pipe, [ImageRequest("a dog", 0)], config))


LONG = "abcdefghij" * 60  # one token per letter in all tiny tokenizers
LIMITS = {  # family -> letters that are read, by counting the template's tokens by hand
    "sd3": 255,
    "sd3_without_t5": 75,
    "flux": 511,
    "chroma": 511,
    "pixart_sigma": 299,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_does_not_read_is_lost_and_named(family, tmp_path_factory):
    base = load_base(str(tiny_folder(family, tmp_path_factory)))
    (cut,) = truncated_prompts(base.pipe, [LONG, "a dog"])
    assert cut.caption == LONG
    assert cut.limit == LIMITS.get(family, cut.limit)
    assert cut.lost == LONG[-len(cut.lost) :]
    read = LONG[: len(LONG) - len(cut.lost)]
    # Another ending changes nothing; another last letter that is read does.
    states = base.encode_captions([LONG])["encoder_hidden_states"]
    assert torch.equal(states, base.encode_captions([read + "z" * len(cut.lost)])["encoder_hidden_states"])
    changed = base.encode_captions([read[:-1] + "z" + cut.lost])["encoder_hidden_states"]
    assert not torch.equal(states, changed)
