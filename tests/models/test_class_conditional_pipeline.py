"""ClassConditionalPipeline against a restatement of guided DDIM, in every scheduler, through files."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from helpers.class_pipelines import CLASSES, class_pipeline, tiny_class_unet

from diffadapt.models.open_pipeline import open_pipeline
from diffadapt.models.sampling import SCHEDULERS, ImageRequest, SamplingConfig, generate_all
from diffadapt.pipelines import ClassConditionalPipeline


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return class_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture
def pipe(folder):
    pipe = ClassConditionalPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ddim(unet, labels, *, guidance, steps, null):
    """Guided deterministic DDIM (arXiv 2010.02502, equation 12; arXiv 2207.12598, equation 6), in float64."""
    unet, schedule = unet.double(), DDIMScheduler(clip_sample=False)
    products = schedule.alphas_cumprod.double()
    x = torch.stack([torch.randn(3, 8, 8, generator=g) for g in seeds(*range(len(labels)))]).double()
    times = list(range(0, 1000, 1000 // steps))[::-1]
    for index, t in enumerate(times):
        with torch.no_grad():
            told, nothing = (
                unet(x, t, class_labels=torch.tensor(some)).sample for some in (labels, [null] * len(labels))
            )
        w = guidance - 1  # of the paper
        noise = (1 + w) * told - w * nothing
        now = products[t]
        before = products[times[index + 1]] if index + 1 < len(times) else products[0]
        clean = (x - (1 - now).sqrt() * noise) / now.sqrt()
        x = before.sqrt() * clean + (1 - before).sqrt() * noise
    return (x / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_images_equal_a_restatement_of_guided_ddim(pipe, folder, guidance):
    pipe.scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    made = pipe([2, 0], guidance, 5, generator=seeds(0, 1), output_type="pt").images
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet")
    expected = ddim(unet, [2, 0], guidance=guidance, steps=5, null=CLASSES)
    torch.testing.assert_close(made.double(), expected, rtol=0, atol=2e-5)


def test_the_class_and_the_guidance_change_the_image(pipe):
    images = [
        pipe(label, g, 3, generator=seeds(0), output_type="pt").images
        for label, g in ((0, 1), (1, 1), (0, 5))
    ]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_a_folder_gives_the_same_images_and_names_the_null_class(pipe, folder, tmp_path):
    pipe.save_pretrained(tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "ClassConditionalPipeline"
    assert index["null_class"] == CLASSES
    again = open_pipeline(str(tmp_path / "again"))
    assert type(again) is ClassConditionalPipeline
    one, other = (
        some([1, 2], 2.0, 3, generator=seeds(0, 1), output_type="np").images for some in (pipe, again)
    )
    assert (one == other).all()


def test_an_image_does_not_depend_on_its_batch(pipe):
    shots = [ImageRequest("", seed, seed % CLASSES) for seed in range(5)]
    one, many = (
        generate_all(
            pipe,
            shots,
            SamplingConfig(num_inference_steps=3, guidance_scale=2.0, scheduler="ddpm", batch_size=b),
        )
        for b in (1, 5)
    )
    torch.testing.assert_close(one, many, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_draws(pipe, scheduler):
    sampler = SamplingConfig(num_inference_steps=4, guidance_scale=2.0, scheduler=scheduler)
    images = generate_all(pipe, [ImageRequest("", 0, 1), ImageRequest("", 1, 2)], sampler)
    assert images.shape == (2, 3, 8, 8)
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.01


def test_pictures_and_tuples_on_request(pipe):
    (pictures,) = pipe([0, 1], 1.0, 1, return_dict=False)
    assert [picture.size for picture in pictures] == [(8, 8), (8, 8)]


@pytest.mark.parametrize("labels", [[CLASSES], [0, 9], [-1], []])
def test_labels_that_are_no_class_are_refused(pipe, labels):
    with pytest.raises(
        ValueError, match=r"no class .*: the base has 3 classes, 0 to 2, and the null class 3"
    ):
        pipe(labels)


def test_without_a_null_class_there_is_no_guidance_and_one_class_more():
    pipe = ClassConditionalPipeline(tiny_class_unet(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    assert pipe.num_classes == CLASSES + 1
    assert pipe(CLASSES, 1.0, 1, output_type="pt").images.shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="no null class"):
        pipe(0, 2.0, 1)


def test_models_without_such_a_table_are_refused():
    with pytest.raises(ValueError, match="null_class 9 is no row"):
        ClassConditionalPipeline(tiny_class_unet(), DDIMScheduler(), null_class=9)
    with pytest.raises(ValueError, match="takes no classes"):
        ClassConditionalPipeline(tiny_class_unet(rows=None), DDIMScheduler())
