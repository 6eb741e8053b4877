"""Images depend on their seed alone."""

import re

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from helpers.pipelines import tiny_sd_pipeline

from diffadapt.models.families import load_base
from diffadapt.models.sampling import SamplingConfig, generate, generate_all, image_requests

TOLERANCE = 2 / 255


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return load_base(str(tiny_sd_pipeline(tmp_path_factory.mktemp("base")))).pipe


@pytest.mark.parametrize("scheduler", [None, "ddim", "ddpm", "dpm++", "euler", "euler_a", "pndm", "unipc"])
@pytest.mark.slow
def test_the_same_images_in_any_batch_size(pipe, scheduler):
    wanted = image_requests("a dog", 5, seed=3)
    images = [
        generate_all(
            pipe, wanted, SamplingConfig(num_inference_steps=4, scheduler=scheduler, batch_size=size)
        )
        for size in (1, 2, 5)
    ]
    assert images[0].shape == (5, 3, 32, 32)
    assert (images[0] - images[1]).abs().max() <= TOLERANCE
    assert (images[0] - images[2]).abs().max() <= TOLERANCE
    assert (images[0][0] - images[0][1]).abs().max() > 0.05


def test_an_image_does_not_depend_on_which_others_are_drawn(pipe):
    sampler = SamplingConfig(num_inference_steps=4)
    some, more = (
        generate_all(pipe, image_requests("a dog", 1, seed=5), sampler),
        generate_all(pipe, image_requests("a dog", 4, seed=2), sampler),
    )
    assert (some[0] - more[3]).abs().max() <= TOLERANCE


def test_images_equal_those_of_the_pipeline_itself(pipe):
    ours = generate_all(
        pipe, image_requests("a dog", 1, seed=7), SamplingConfig(num_inference_steps=4, guidance_scale=5.0)
    )
    theirs = pipe(
        "a dog",
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="pt",
    ).images
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_settings_reach_the_pipeline(pipe):
    own = pipe.scheduler
    sizes = SamplingConfig(
        num_inference_steps=2, height=48, width=64, negative_prompt="ugly", scheduler="euler"
    )
    assert [batch.shape for batch in generate(pipe, image_requests("a", 3), sizes)] == [(3, 3, 48, 64)]
    assert pipe.scheduler is own
    plain, negative = (
        generate_all(pipe, image_requests("a", 1), SamplingConfig(num_inference_steps=2, negative_prompt=n))
        for n in (None, "ugly cat")
    )
    assert not torch.equal(plain, negative)


def test_an_unknown_scheduler_lists_the_known(pipe):
    with pytest.raises(ValueError, match="unknown scheduler 'eular'; choose from ddim"):
        generate_all(pipe, image_requests("a", 1), SamplingConfig(scheduler="eular"))


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm++", "euler", "euler_a", "pndm", "unipc"])
def test_a_scheduler_of_another_kind_than_the_bases_is_refused(pipe, scheduler):
    own = pipe.scheduler
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    try:
        with pytest.raises(ValueError, match=rf"--scheduler {re.escape(scheduler)} does not fit this base"):
            generate_all(pipe, image_requests("a", 1), SamplingConfig(scheduler=scheduler))
        pipe.scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        if scheduler in ("ddim", "euler"):
            with pytest.raises(ValueError, match="which predicts flows"):
                generate_all(pipe, image_requests("a", 1), SamplingConfig(scheduler=scheduler))
    finally:
        pipe.scheduler = own
