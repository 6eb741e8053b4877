"""A frozen adapter that works during training only, and the notice that asks for one."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers.family_pipelines import tiny_pipeline
from helpers.pipelines import tiny_sd_pipeline, write_pictures
from helpers.scripts import runner
from safetensors.torch import load_file

import diffadapt as da
from diffadapt.models.families import family_of_pipeline, load_base
from diffadapt.training.setup import distillation_notices


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, an assistant for it, the base with the assistant merged, and images."""
    place = tmp_path_factory.mktemp("place")
    tiny_sd_pipeline(place / "base")
    write_pictures(place / "images", 2)
    pipe = load_base(str(place / "base")).pipe
    assistant = da.attach(pipe, da.LoRA(rank=2), targets="attention")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    da.save(assistant, place / "assistant.safetensors")
    da.export(assistant, place / "merged", to="merged")
    return place


@pytest.fixture
def train(place, tmp_path, monkeypatch):
    def train(name, base, *options):
        output = tmp_path / name
        fixed = {
            "pretrained_model_name_or_path": place / base,
            "instance_data_dir": place / "images",
            "instance_prompt": "a sks dog",
            "output_dir": output,
            "rank": 2,
            "max_train_steps": 2,
            "train_batch_size": 2,
            "learning_rate": 1e-3,
            "validation_steps": 1,
            "num_validation_images": 1,
            "num_inference_steps": 2,
            "num_threads": 1,
            "mixed_precision": "no",
        }
        arguments = [part for option, value in fixed.items() for part in (f"--{option}", value)]
        assert runner("dreambooth", monkeypatch)(*arguments, *options) == 0
        return output

    return train


@pytest.mark.slow
def test_an_assistant_works_in_training_and_not_in_images(place, train):
    helped = train("helped", "base", "--assistant_adapter", place / "assistant.safetensors")
    alone = train("alone", "base")
    merged = train("merged", "merged")

    # It trains as on the base with the assistant merged, which is not as without it.
    tensors, plain, expected = (load_file(run / "adapter.safetensors") for run in (helped, alone, merged))
    assert tensors.keys() == expected.keys()  # nothing of the assistant is saved
    for name, tensor in tensors.items():
        assert torch.allclose(tensor, expected[name], atol=2e-5), name
    assert max((tensor - plain[name]).abs().max() for name, tensor in tensors.items()) > 1e-4

    # Images before training are those of the bare base.
    before = "samples/before"
    for image in (alone / before).glob("*.png"):
        assert (helped / before / image.name).read_bytes() == image.read_bytes()
    # Images of a validation and after training are those of the base with the trained adapter alone.
    run = json.loads((helped / "run.json").read_text(encoding="utf-8"))
    assert run["options"]["assistant_adapter"] == str(place / "assistant.safetensors")
    names = {path.name for path in (helped / "samples" / "after").glob("*.png")}
    again = train("again", "base", "--resume_from_checkpoint", helped / "checkpoint-2", *accepted())
    for name in names:
        assert (again / "samples/after" / name).read_bytes() == (helped / "samples/after" / name).read_bytes()


def accepted():
    """Options to resume a finished run without its assistant: only images are generated."""
    return ["--accept_changes", "assistant_adapter"]


def test_an_assistant_must_be_a_file(place, train, capsys):
    with pytest.raises(AssertionError):
        train("lost", "base", "--assistant_adapter", place / "nowhere.safetensors")
    assert "nowhere.safetensors" in capsys.readouterr().err


DISTILLED = {  # family -> how its distilled base differs, and what is trained in its place
    "flux_schnell": (lambda pipe: None, "FLUX.1-dev"),
    "z_image": (lambda pipe: pipe.scheduler.register_to_config(shift=3.0), "Tongyi-MAI/Z-Image"),
    "flux2_klein": (lambda pipe: pipe.register_to_config(is_distilled=True), "klein-base"),
    "krea2": (lambda pipe: pipe.register_to_config(is_distilled=True), "Krea-2-Raw"),
}


@pytest.mark.parametrize("name", DISTILLED)
def test_a_distilled_base_is_told_from_the_one_to_train(name):
    distil, other = DISTILLED[name]
    pipe = tiny_pipeline(name)
    family = family_of_pipeline(type(pipe).__name__)
    model = family(pipe, "this/base", family.profile_of_family)
    options = SimpleNamespace(assistant_adapter=None)
    if name != "flux_schnell":
        assert distillation_notices(model, options) == []
    distil(pipe)
    (notice,) = distillation_notices(model, options)
    assert other in notice
    assert "--base this/base" in notice
    assert distillation_notices(model, SimpleNamespace(assistant_adapter="file")) == []


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen_image", "chroma", "pixart_sigma"])
def test_other_bases_are_trained_without_a_word(name):
    pipe = tiny_pipeline(name)
    family = family_of_pipeline(type(pipe).__name__)
    model = family(pipe, "this/base", family.profile_of_family)
    assert distillation_notices(model, SimpleNamespace(assistant_adapter=None)) == []
