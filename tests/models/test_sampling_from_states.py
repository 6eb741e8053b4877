"""Images from encoded captions equal those from prompts, also when the text encoders are gone."""

import pytest
import torch
from helpers.family_pipelines import FAMILIES, tiny_folder

from diffadapt.data.encoding import EncodedCaptions
from diffadapt.models.families import load_base
from diffadapt.models.sampling import ImageRequest, SamplingConfig, captions_to_encode, generate_all

pytestmark = pytest.mark.slow

REQUESTS = [ImageRequest("a dog", 0), ImageRequest("a much longer caption of a cat", 1)]
WITHOUT_NEGATIVE_PROMPT = ("flux", "flux_schnell", "flux2_klein", "flux2_dev")


def config_of(family, batch_size):
    negative_prompt = None if family in WITHOUT_NEGATIVE_PROMPT else "dark and blurred"
    return SamplingConfig(
        num_inference_steps=2,
        guidance_scale=3.0,
        negative_prompt=negative_prompt,
        height=64,
        width=96,
        batch_size=batch_size,
    )


def without_text_encoders(model, requests, config):
    """Encodes what the requests need and takes the text encoders out of the pipeline."""
    captions = EncodedCaptions(model, None, recent=None)
    prompts = [request.prompt for request in requests]
    captions.prepare(captions_to_encode(type(model), prompts, config))
    for name in model.text_encoders:
        setattr(model.pipe, name, None)
    assert not model.text_encoders
    return captions.rows


@pytest.mark.parametrize("family", FAMILIES)
def test_images_from_states_are_those_from_prompts(family, tmp_path_factory):
    model = load_base(str(tiny_folder(family, tmp_path_factory)))
    config = config_of(family, batch_size=2)
    expected = generate_all(model.pipe, REQUESTS, config)
    states = without_text_encoders(model, REQUESTS, config)
    images = generate_all(model.pipe, REQUESTS, config, prompt_states=states)
    assert (images - expected).abs().max() < 2e-6
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_negative_prompt_the_pipelines_own_is_encoded(family, tmp_path_factory):
    model = load_base(str(tiny_folder(family, tmp_path_factory)))
    config = SamplingConfig(num_inference_steps=1, guidance_scale=3.0, height=64, width=64, batch_size=1)
    expected = generate_all(model.pipe, REQUESTS[:1], config)
    states = without_text_encoders(model, REQUESTS[:1], config)
    images = generate_all(model.pipe, REQUESTS[:1], config, prompt_states=states)
    assert (images - expected).abs().max() < 2e-6


def test_states_keep_the_precision_of_the_text_encoders(tmp_path_factory):
    model = load_base(str(tiny_folder("sd3", tmp_path_factory)), dtype=torch.bfloat16)
    row = EncodedCaptions(model, None, recent=None).row("a dog")
    assert {value.dtype for value in row.values()} == {torch.bfloat16}
