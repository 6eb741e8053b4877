"""Batches are functions of the position: order, noise and crops do not depend on what came before."""

import pytest
import torch
from pipelines import tiny_sd_pipeline, write_pictures

from diffadapt.data.batches import Batches
from diffadapt.data.class_images import class_examples
from diffadapt.data.encoding import Cut
from diffadapt.data.examples import Order, folder_examples
from diffadapt.models.families import load_base
from diffadapt.sampling import Sampler


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_base(str(tiny_sd_pipeline(tmp_path_factory.mktemp("base"), vae="kl")))


def same(first, second):
    return (
        torch.equal(first.latents, second.latents)
        and torch.equal(first.noise, second.noise)
        and torch.equal(first.timesteps, second.timesteps)
        and all(torch.equal(v, second.conditions[k]) for k, v in first.conditions.items())
    )


def test_every_epoch_uses_every_picture_once_in_its_own_order():
    order = Order(instances=9, classes=0, seed=0)
    epochs = [[d.index for d in order.draws(range(9 * e, 9 * e + 9))] for e in range(3)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_no_two_draws_of_a_run_share_their_randomness():
    order = Order(instances=3, classes=7, seed=0)
    draws = order.draws(range(21))
    assert len({(d.role, d.epoch, d.sample) for d in draws}) == len(draws) == 42
    assert {d.index for d in draws if d.role == "class"} == set(range(7))


def test_a_batch_does_not_depend_on_what_was_drawn_before(tmp_path, model):
    examples = folder_examples(write_pictures(tmp_path, 3, size=(48, 40)), "a dog")
    make = lambda: Batches(model, examples, resolution=32, center_crop=False, seed=1)  # noqa: E731
    first, second = make(), make()
    for start in range(0, 8, 2):
        first.batch(range(start, start + 2))
    assert same(first.batch(range(8, 12)), second.batch(range(8, 12)))
    assert not same(first.batch(range(8, 12)), first.batch(range(12, 16)))


def test_the_seed_changes_order_noise_and_timesteps(tmp_path, model):
    examples = folder_examples(write_pictures(tmp_path, 3), "a dog")
    one, two = (
        Batches(model, examples, resolution=32, center_crop=True, seed=s).batch(range(4)) for s in (0, 1)
    )
    assert not torch.equal(one.noise, two.noise)
    assert not torch.equal(one.timesteps, two.timesteps)


def test_latents_follow_the_posterior_and_the_scale_of_the_autoencoder(tmp_path, model):
    examples = folder_examples(write_pictures(tmp_path, 1), "a dog")
    batches = Batches(model, examples, resolution=32, center_crop=True, seed=0)
    drawn = batches.batch(range(200)).latents  # 200 posterior samples of one picture
    encoded, _ = batches.pictures.get(examples[0].source, Cut((32, 32)))
    mean, log_variance = encoded.chunk(2)
    scale = model.pipe.vae.config.scaling_factor
    assert torch.allclose(drawn.mean(0), mean * scale, atol=0.4 * scale)
    assert drawn.std(0).mean() == pytest.approx(float((0.5 * log_variance).exp().mean() * scale), rel=0.05)


def test_missing_class_pictures_are_drawn_and_present_ones_kept(tmp_path, model):
    write_pictures(tmp_path, 2)
    make = {"prompt": "a dog", "sampler": Sampler(num_inference_steps=2, batch_size=2), "seed": 0}
    examples = class_examples(model.pipe, tmp_path, count=5, **make)
    assert [e.source.name for e in examples][:3] == ["class-00000.png", "class-00001.png", "class-00002.png"]
    assert len(examples) == 5
    before = examples[0].source.stat().st_mtime_ns
    assert len(class_examples(model.pipe, tmp_path, count=6, **make)) == 6
    assert examples[0].source.stat().st_mtime_ns == before
