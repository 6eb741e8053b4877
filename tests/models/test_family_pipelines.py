"""The tiny pipelines of the transformer families that other tests rely on."""

import pytest
import torch
from helpers.family_pipelines import FAMILIES, SIDE, tiny_folder, tiny_pipeline
from torch import nn

pytestmark = pytest.mark.slow

# what the stock pipelines need for one small image under guidance, beside the prompt and the size
ARGUMENTS = {
    "flux": {"true_cfg_scale": 2.0, "negative_prompt": " "},
    "flux_schnell": {"true_cfg_scale": 2.0, "negative_prompt": " "},
    "qwen_image": {"true_cfg_scale": 2.0, "negative_prompt": " "},
    "pixart_sigma": {"guidance_scale": 2.0, "use_resolution_binning": False},
}


def _load(family, tmp_path_factory):
    """The saved pipeline, opened by its stock class; that wants to be told which encoders are missing."""
    pipe = tiny_pipeline(family)
    missing_parts = {name: None for name, component in pipe.components.items() if component is None}
    saved = type(pipe).from_pretrained(tiny_folder(family, tmp_path_factory), **missing_parts)
    saved.set_progress_bar_config(disable=True)
    return saved


def _weights(pipe):
    weights = {}
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            for key, tensor in component.state_dict().items():
                weights[f"{name}.{key}"] = tensor
    return weights


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_pipeline_has_the_same_bits_every_time_and_after_saving(family, tmp_path_factory):
    pipe = tiny_pipeline(family)
    weights = _weights(pipe)
    for other in (tiny_pipeline(family), _load(family, tmp_path_factory)):
        assert type(other) is type(pipe)
        other_weights = _weights(other)
        assert other_weights.keys() == weights.keys()
        for name, tensor in weights.items():
            assert torch.equal(tensor, other_weights[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_tiny_pipeline_samples_and_reads_its_prompt(family, tmp_path_factory):
    pipe = _load(family, tmp_path_factory)
    arguments = ARGUMENTS.get(family, {"guidance_scale": 2.0})
    images = []
    for prompt in ("a cat", "two dogs"):
        generator = torch.Generator().manual_seed(0)
        output = pipe(
            prompt=prompt,
            height=SIDE,
            width=SIDE,
            num_inference_steps=1,
            generator=generator,
            output_type="pt",
            **arguments,
        )
        images.append(output.images)
    assert images[0].shape == (1, 3, SIDE, SIDE)
    assert images[0].isfinite().all()
    assert not torch.equal(*images)
