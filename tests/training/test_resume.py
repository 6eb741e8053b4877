"""A run that was stopped and continued ends in the same bits as one that was not."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from helpers.pipelines import tiny_sd_pipeline, train_options, write_pictures
from helpers.tiny_bases import tiny_base
from safetensors.torch import load_file

import diffadapt as da
from diffadapt.data.batches import Batches
from diffadapt.data.examples import folder_examples
from diffadapt.models.families import load_base
from diffadapt.training.checkpoint import checkpoint_io
from diffadapt.training.checkpoint.checkpoint_files import find_checkpoint, run_id_of
from diffadapt.training.checkpoint.state_check import state_digest
from diffadapt.training.loop import initial_state, train
from diffadapt.training.objective import Objective


def make(tmp_path, base=None, **given):
    """A train_state at step 0 and its batches, with random crops, a posterior and dropout."""
    if not (tmp_path / "mine").exists():
        write_pictures(tmp_path / "mine", 3, size=(48, 40))
    if base is None:
        base = tmp_path / "base"
    if not base.exists():
        tiny_sd_pipeline(base, vae="kl")
    options = train_options(
        pretrained_model_name_or_path=str(base),
        **{"gradient_accumulation_steps": 2, "lr_scheduler": "cosine", "lr_warmup_steps": 50, **given},
    )
    model = load_base(str(base))
    examples = folder_examples(tmp_path / "mine", "a sks dog")
    batches = Batches(model, examples, resolution=32, center_crop=False, seed=options.seed)
    adapter = da.attach(model.pipe, da.make_method("lora", rank=2, dropout=0.3), seed=options.seed)
    objective = Objective(model.denoiser, adapter, predict=model.predict, schedule=model.training_schedule())
    return initial_state(Accelerator(cpu=True), objective, options), batches


def tensors(train_state):
    return {name: value.detach().clone() for name, value in train_state.adapter.state_dict().items()}


@pytest.mark.parametrize("family", ["sd", "flux", "qwen_image", "pixart_sigma"])
@pytest.mark.slow
def test_6_steps_equal_3_and_a_resume_of_3_bit_for_bit(tmp_path, tmp_path_factory, family):
    base = tiny_base(family, tmp_path_factory)
    whole, batches = make(tmp_path, base)
    losses = [step.loss for step in train(whole, batches)]

    first, batches = make(tmp_path, base)
    steps = train(first, batches)
    part = [next(steps).loss for _ in range(3)]
    checkpoint_io.save_checkpoint(first, tmp_path / "run")

    second, batches = make(tmp_path, base)
    checkpoint_io.restore_checkpoint(second, find_checkpoint("latest", tmp_path / "run"))
    part += [step.loss for step in train(second, batches)]

    assert part == losses
    for name, value in tensors(whole).items():
        assert torch.equal(value, tensors(second)[name]), name
    assert whole.scheduler.get_last_lr() == second.scheduler.get_last_lr()


def test_a_checkpoint_holds_no_pickle_and_a_usable_adapter(tmp_path):
    train_state, batches = make(tmp_path)
    next(train(train_state, batches))
    folder = checkpoint_io.save_checkpoint(train_state, tmp_path / "run")
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter.safetensors",
        "state.json",
        "state.safetensors",
    ]
    json.loads((folder / "state.json").read_text(encoding="utf-8"))
    load_file(folder / "state.safetensors")
    da.load(load_base(str(tmp_path / "base")).pipe, folder / "adapter.safetensors")


def test_an_unfinished_checkpoint_is_never_taken(tmp_path):
    train_state, batches = make(tmp_path)
    next(train(train_state, batches))
    checkpoint_io.save_checkpoint(train_state, tmp_path / "run")
    (tmp_path / "run" / ".unfinished-checkpoint-2").mkdir()
    (tmp_path / "run" / "checkpoint-9").mkdir()
    assert find_checkpoint("latest", tmp_path / "run").name == "checkpoint-1"


def test_other_options_than_the_checkpoints_are_an_error_that_names_them(tmp_path):
    train_state, batches = make(tmp_path)
    next(train(train_state, batches))
    checkpoint = checkpoint_io.save_checkpoint(train_state, tmp_path / "run")
    other, _ = make(tmp_path, adam_beta2=0.99)
    with pytest.raises(ValueError, match=r"adam_beta2: 0.999 then, 0.99 now"):
        checkpoint_io.restore_checkpoint(other, checkpoint)


@pytest.mark.slow
def test_a_run_at_a_constant_rate_can_be_made_longer(tmp_path):
    constant = {"lr_scheduler": "constant", "lr_warmup_steps": 0}
    short, batches = make(tmp_path, **constant, max_train_steps=2)
    long, _ = make(tmp_path, **constant, max_train_steps=4)
    whole, _ = make(tmp_path, **constant, max_train_steps=4)
    losses = [step.loss for step in train(whole, batches)]
    first = [step.loss for step in train(short, batches)]
    checkpoint_io.restore_checkpoint(long, checkpoint_io.save_checkpoint(short, tmp_path / "run"))
    assert first + [step.loss for step in train(long, batches)] == losses


def test_a_damaged_checkpoint_is_an_error_with_a_remedy(tmp_path):
    train_state, batches = make(tmp_path)
    next(train(train_state, batches))
    checkpoint = checkpoint_io.save_checkpoint(train_state, tmp_path / "run")
    file = checkpoint / "state.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="use an earlier checkpoint"):
        checkpoint_io.restore_checkpoint(make(tmp_path)[0], checkpoint)


def test_a_number_of_processes_that_is_no_integer_is_malformed(tmp_path):
    train_state, batches = make(tmp_path)
    next(train(train_state, batches))
    checkpoint = checkpoint_io.save_checkpoint(train_state, tmp_path / "run")
    content = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    content["processes"] = math.inf
    del content["sha256"]
    digest = state_digest(content, load_file(checkpoint / "state.safetensors"))
    (checkpoint / "state.json").write_text(json.dumps({**content, "sha256": digest}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"malformed .*infinity.*; use an earlier checkpoint"):
        checkpoint_io.restore_checkpoint(make(tmp_path)[0], checkpoint)


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"run": ["a"]}', '{"run": 1}'])
def test_the_run_of_a_checkpoint_that_does_not_say_it_is_unknown(state, tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text(state, encoding="utf-8")
    assert run_id_of(checkpoint) is None
    assert find_checkpoint("latest", tmp_path) == checkpoint


def test_no_checkpoint_lists_those_there_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="there are: none"):
        find_checkpoint("latest", tmp_path)


@pytest.mark.slow
def test_a_state_that_lacks_a_value_of_the_optimizer_leaves_the_run_as_it_was(tmp_path, monkeypatch):
    train_state, batches = make(tmp_path)
    next(train(train_state, batches))
    whole = checkpoint_io._state

    def without_steps(saved):
        content = whole(saved)
        first = content["optimizer"]["state"][0]
        content["optimizer"]["state"][0] = {name: v for name, v in first.items() if name != "step"}
        return content

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_io, "_state", without_steps)
        checkpoint = checkpoint_io.save_checkpoint(train_state, tmp_path / "run")
    next(train(train_state, batches))
    values = tensors(train_state)
    moments = train_state.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    with pytest.raises(ValueError, match="has no state of adamw"):
        checkpoint_io.restore_checkpoint(train_state, checkpoint)
    assert all(torch.equal(value, values[name]) for name, value in tensors(train_state).items())
    assert torch.equal(train_state.optimizer.state_dict()["state"][0]["exp_avg"], moments)
    assert train_state.step == 2
