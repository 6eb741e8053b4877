"""Text encoders that are trained: gradients, exact resumes, one file, the same images from it."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from helpers.pipelines import train_options, write_pictures
from helpers.tiny_bases import tiny_base

import diffadapt as da
from diffadapt.adapters.attach import attached
from diffadapt.common.images import CropGeometry
from diffadapt.data.batches import Batches
from diffadapt.data.examples import folder_examples
from diffadapt.models.families import load_base
from diffadapt.models.sampling import SamplingConfig, generate_all, image_requests
from diffadapt.training.checkpoint import checkpoint_io
from diffadapt.training.checkpoint.checkpoint_files import find_checkpoint
from diffadapt.training.loop import initial_state, train
from diffadapt.training.objective import Objective

ENCODERS = {  # family -> its text encoders that can be trained
    "sd": {"text_encoder"},
    "sdxl": {"text_encoder", "text_encoder_2"},
    "sd3": {"text_encoder", "text_encoder_2"},
    "flux": {"text_encoder"},
}
SAMPLER = SamplingConfig(num_inference_steps=2, height=32, width=32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family -> folder of a base; and pictures in the folder beside it"""
    bases = {family: tiny_base(family, tmp_path_factory) for family in ENCODERS}
    write_pictures(bases["sd"].parent / "pictures", 3, size=(48, 40))
    return bases


def make(folder, method="lora(rank=2)", steps=4, **given):
    """A train_state at step 0, its batches and its base."""
    model = load_base(str(folder))
    model.train_text_encoder = True
    examples = folder_examples(folder.parent / "pictures", "a sks dog")
    batches = Batches(model, examples, resolution=32, center_crop=True, seed=0)
    adapter = da.attach(model.pipe, da.make_method(method), "attention", text_encoder_targets="all")
    objective = Objective(model.denoiser, adapter, predict=model.predict, schedule=model.training_schedule())
    given = {"max_train_steps": steps, "learning_rate": 1e-2, **given}
    options = train_options(pretrained_model_name_or_path=str(folder), **given)
    return initial_state(Accelerator(cpu=True), objective, options), batches, model


def tensors(train_state):
    return {name: value.detach().clone() for name, value in train_state.adapter.state_dict().items()}


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_captions_are_kept_as_token_ids(folders, family):
    _, batches, model = make(folders[family])
    ids = batches.batch([0, 1]).conditions["input_ids"]
    assert ids.dtype == torch.int64
    assert ids.tolist()[0] == model.pipe.tokenizer("a sks dog", padding="max_length").input_ids
    assert "encoder_hidden_states" not in batches.batch([0]).conditions


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_captions_are_kept_as_token_ids_of_clip_and_states_of_t5(folders, family):
    _, batches, model = make(folders[family])
    conditions = batches.batch([0, 1]).conditions
    clip = model.pipe.tokenizer(["a sks dog"], padding="max_length", return_tensors="pt")
    assert torch.equal(conditions["input_ids_0"], clip.input_ids.repeat(2, 1))
    t5 = model.pipe.text_encoder_3 if family == "sd3" else model.pipe.text_encoder_2
    assert conditions["t5_states"].shape[-1] == t5.config.d_model
    assert "encoder_hidden_states" not in conditions


@pytest.mark.parametrize("method", ["lora(rank=2)", "superlora(rank=2, projection=linear)", "liera(rank=2)"])
@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.slow
def test_every_trained_tensor_gets_a_gradient(folders, family, method):
    train_state, batches, model = make(folders[family], method, steps=2)
    before = tensors(train_state)
    assert len(list(train(train_state, batches))) == 2
    still = [name for name, value in tensors(train_state).items() if torch.equal(value, before[name])]
    assert not still
    roots = {site.name.partition(".")[0] for site in train_state.adapter.sites}
    assert roots == {model.denoiser_name, *ENCODERS[family]}


@pytest.mark.parametrize("method", ["lora(rank=2)", "lora(rank=2)+norms", "peft:LORA"])
@pytest.mark.slow
def test_text_encoders_learn_at_their_own_rate(folders, method):
    train_state, batches, _ = make(
        folders["sdxl"], method, steps=2, text_encoder_lr=1e-4, lr_scheduler="linear", optimizer="SGD"
    )
    before = {name: p.detach().clone() for name, p in train_state.adapter.named_parameters()}
    gradients: dict[str, torch.Tensor] = {}

    def keep(name, parameter):
        gradients[name] = parameter.grad.detach().clone()

    for name, parameter in train_state.adapter.named_parameters():
        parameter.register_post_accumulate_grad_hook(partial(keep, name))
    train_state.options = replace(train_state.options, max_grad_norm=1e9)
    made = next(train(train_state, batches))
    assert (made.lr, made.text_encoder_lr) == (1e-2, 1e-4)
    groups = [{id(p) for p in group["params"]} for group in train_state.optimizer.param_groups]
    assert all(groups)
    assert not groups[0] & groups[1]
    for name, parameter in train_state.adapter.named_parameters():
        rate = 1e-2 if id(parameter) in groups[0] else 1e-4
        expected = before[name].double() - rate * gradients[name].double()
        assert (parameter.double() - expected).abs().max() <= 1e-7, name
    assert train_state.scheduler.get_last_lr() == [1e-2 / 2, 1e-4 / 2]
    of_text = sum(site.name.startswith("text_encoder") for site in train_state.adapter.sites)
    assert len(groups[1]) >= of_text > 0


def test_tensors_that_serve_both_cannot_have_two_rates(folders):
    with pytest.raises(ValueError, match="superlora shares its trained tensors among layers"):
        make(folders["sd"], "superlora(rank=2, groups=1)", text_encoder_lr=1e-4)


def test_the_prediction_with_token_ids_is_that_with_text_states(folders):
    for folder in (folders["sd"], folders["sdxl"]):
        model, captions = load_base(str(folder)), ["a dog", ""]
        sizes = model.size_conditions([CropGeometry((40, 40), (0, 0), (32, 32))] * 2)
        noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([3, 900])
        states = {**model.encode_captions(captions), **sizes}
        model.train_text_encoder = True
        ids = {**model.encode_captions(captions), **sizes}
        with torch.no_grad():
            predicted = [model.predict(model.denoiser, noisy, timesteps, told) for told in (states, ids)]
        assert torch.equal(*predicted)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_the_prediction_with_token_ids_and_t5_is_that_of_the_pipelines_states(folders, family):
    model = load_base(str(folders[family]))
    captions = ["a dog", ""]
    noisy = torch.randn(2, 16, 4, 4)
    levels = torch.tensor([0.2, 0.9])
    states = model.encode_captions(captions)
    model.enable_text_encoder_training()
    ids = model.encode_captions(captions)
    assert states.keys().isdisjoint(ids)
    with torch.no_grad():
        expected = model.predict(model.denoiser, noisy, levels, states)
        predicted = model.predict(model.denoiser, noisy, levels, ids)
    assert torch.equal(predicted, expected)


def test_layers_behind_the_states_that_sdxl_reads_are_left_out(folders):
    pipe = load_base(str(folders["sdxl"])).pipe
    adapter = da.attach(pipe, da.LoRA(rank=2), "attention", text_encoder_targets="all")
    names = [site.name for site in adapter.sites]
    assert any(name.startswith("text_encoder.") and ".layers.1." in name for name in names)
    assert not any(name.startswith("text_encoder.") and ".layers.2." in name for name in names)
    assert any(name.startswith("text_encoder_2.") and ".layers.2." in name for name in names)
    assert not any(name.endswith("text_projection") for name in names)  # unless named
    da.detach(adapter)
    with pytest.raises(ValueError, match=r"choose only layers of text_encoder that have no effect"):
        da.attach(pipe, da.LoRA(rank=2), "attention", text_encoder_targets="*layers.2.*q_proj")
    assert not attached(pipe)


def test_a_single_text_encoder_is_adapted_to_its_last_layer(folders):
    pipe = load_base(str(folders["sd"])).pipe
    adapter = da.attach(pipe, da.LoRA(rank=2), "attention", text_encoder_targets="attention")
    assert any(".layers.1." in site.name for site in adapter.sites)


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.slow
def test_4_steps_equal_2_and_a_resume_of_2_and_the_file_gives_the_images(folders, family, tmp_path):
    whole, batches, trained = make(folders[family])
    losses = [step.loss for step in train(whole, batches)]

    first, batches, _ = make(folders[family])
    steps = train(first, batches)
    part = [next(steps).loss for _ in range(2)]
    checkpoint_io.save_checkpoint(first, tmp_path / "run")
    second, batches, _ = make(folders[family])
    checkpoint_io.restore_checkpoint(second, find_checkpoint("latest", tmp_path / "run"))
    part += [step.loss for step in train(second, batches)]

    assert part == losses
    for name, value in tensors(whole).items():
        assert torch.equal(value, tensors(second)[name]), name

    file = checkpoint_io.save_adapter(whole, tmp_path)
    fresh = load_base(str(folders[family])).pipe
    plain = generate_all(fresh, image_requests("a sks dog", 2), SAMPLER)
    da.load(fresh, file)
    images = generate_all(fresh, image_requests("a sks dog", 2), SAMPLER)
    assert torch.equal(images, generate_all(trained.pipe, image_requests("a sks dog", 2), SAMPLER))
    assert not torch.equal(images, plain)
    if family in ("sd", "sdxl"):
        report = da.export(whole.adapter, tmp_path / "kohya.safetensors", "kohya")
        assert {"ComfyUI", "A1111", "LyCORIS"} <= set(report.accepted_by)
