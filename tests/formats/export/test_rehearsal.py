"""What is said before training of an export is what the export does after it."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.pipelines import tiny_sd_pipeline

import diffadapt as da
from diffadapt.formats.export import rehearsal
from diffadapt.formats.export.rehearsal import obstacle

METHODS = [
    *(name for name in da.METHODS if name != "class_embedding"),
    "lora(rank=2)+difffit",
    "difffit(beta=False)",
    "dora+bitfit",
    "peft:LOHA",
    "peft:LORA",
]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return StableDiffusionPipeline.from_pretrained(
        tiny_sd_pipeline(tmp_path_factory.mktemp("base")), safety_checker=None
    )


def train(adapter):
    """Values as training leaves them: other ones than those of the trial."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_what_is_said_before_training_is_what_the_export_does(pipe, tmp_path, method):
    if method.startswith("peft:"):
        pytest.importorskip("peft")
    adapter = da.attach(pipe, da.make_method(method), targets="attention")
    try:
        before = {name: value.clone() for name, value in adapter.state_dict().items()}
        said = {to: obstacle(adapter, to) for to in ("kohya", "diffusers", "merged")}
        assert all(torch.equal(value, before[name]) for name, value in adapter.state_dict().items())
        train(adapter)
        for to, reason in said.items():
            try:
                da.export(adapter, tmp_path / to, to)
            except ValueError:
                assert reason is not None, f"{to} was said to be possible"
            else:
                assert reason is None, f"{to} was said to be impossible: {reason}"
    finally:
        da.detach(adapter)


def test_what_a_device_cannot_do_is_an_obstacle_and_no_crash(pipe, monkeypatch):
    def lacks_float64(*_, **__):
        raise TypeError("this device has no float64")

    monkeypatch.setattr(rehearsal, "exported_layers", lacks_float64)
    adapter = da.attach(pipe, da.make_method("lora", rank=2), targets="attention")
    try:
        assert obstacle(adapter, "kohya") == "this device has no float64"
    finally:
        da.detach(adapter)


def test_a_layer_that_has_no_name_there_is_found_among_many(pipe):
    """One layer of each form is verified; names are looked at in all layers."""
    adapter = da.attach(pipe, da.make_method("lora", rank=2), targets="attention+time_embedding.*")
    try:
        assert obstacle(adapter, "kohya") is None
    finally:
        da.detach(adapter)
    unet = da.attach(pipe.vae, da.make_method("lora", rank=2), targets="all")
    try:
        assert "has no name for layers of" in obstacle(unet, "kohya")
    finally:
        da.detach(unet)
