"""The moving average: its formula, its place in files and its resume."""

import pytest
import torch
from helpers.small_run import SmallBatches, bits, same_bits, small_train_state
from safetensors.torch import load_file

import diffadapt as da
from diffadapt.training.checkpoint import checkpoint_io
from diffadapt.training.loop import train

OPTIONS = {"max_train_steps": 6, "use_ema": True, "ema_decay": 0.4, "learning_rate": 0.05}


def averages(train_state):
    with train_state.average.in_place():
        return bits(train_state)


def test_it_is_the_average_of_the_formula():
    train_state = small_train_state(**OPTIONS)
    expected = None
    for updates, _ in enumerate(train(train_state, SmallBatches()), start=1):
        own = {name: value.double() for name, value in bits(train_state).items()}
        decay = min(0.4, updates / (updates + 9)) if updates > 1 else 0.0
        expected = own if expected is None else expected
        expected = {name: decay * expected[name] + (1 - decay) * own[name] for name in own}
    found = averages(train_state)
    assert all(torch.allclose(found[name].double(), value, atol=1e-6) for name, value in expected.items())
    assert not same_bits(found, bits(train_state))


def test_the_file_holds_the_average_and_training_goes_on_with_its_own_bits(tmp_path):
    train_state = small_train_state(**OPTIONS)
    list(train(train_state, SmallBatches()))
    own, average = bits(train_state), averages(train_state)
    path = checkpoint_io.save_adapter(train_state, tmp_path)
    assert same_bits(own, bits(train_state))
    stored = load_file(path)
    assert sorted(float(v.sum()) for v in stored.values()) == sorted(float(v.sum()) for v in average.values())
    assert da.read_metadata(path)["weights"] == "moving average, decay 0.4"


def test_a_resume_goes_on_with_the_same_average(tmp_path):
    whole, batches = small_train_state(**OPTIONS), SmallBatches()
    list(train(whole, batches))
    first = small_train_state(**OPTIONS)
    steps = train(first, batches)
    for _ in range(3):
        next(steps)
    second = small_train_state(**OPTIONS)
    checkpoint_io.restore_checkpoint(second, checkpoint_io.save_checkpoint(first, tmp_path))
    list(train(second, batches))
    assert same_bits(bits(whole), bits(second))
    assert same_bits(averages(whole), averages(second))


def test_a_decay_that_is_none_is_refused():
    with pytest.raises(ValueError, match="--ema_decay must be at least 0 and below 1, got 1"):
        small_train_state(use_ema=True, ema_decay=1.0)
