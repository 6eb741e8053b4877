"""The loss on held-out images: the same at every measurement, in batches of any size."""

import pytest
import torch
from accelerate import Accelerator
from helpers.pipelines import write_pictures
from helpers.tiny_bases import SIDE, tiny_base

import diffadapt as da
from diffadapt.common.images import list_images
from diffadapt.data.examples import Example
from diffadapt.models.families import load_base
from diffadapt.training.report.held_out import HeldOutLoss

CAPTIONS = ("a disc", "a disc of many colours", "disc")


@pytest.mark.parametrize("family", ["sd", "sd3", "z_image"])
def test_the_loss_does_not_depend_on_the_batch(family, tmp_path, tmp_path_factory):
    model = load_base(str(tiny_base(family, tmp_path_factory)))
    paths = list_images(write_pictures(tmp_path / "others", len(CAPTIONS)))
    examples = [Example(path, caption) for path, caption in zip(paths, CAPTIONS, strict=True)]
    losses = []
    for batch_size in (1, 2, 100):
        loss = HeldOutLoss(model, examples, Accelerator(cpu=True), resolution=SIDE, batch_size=batch_size)
        losses.append(loss.measure())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert loss.measure() == losses[-1]
    adapter = da.attach(model.pipe, da.LoRA(rank=2), targets="attention")
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    assert loss.measure() != losses[-1]  # the adapter works inside the denoiser
