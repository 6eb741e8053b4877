"""Runs that could only waste time end at once, with what is wrong and the remedy."""

import itertools
import math

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from helpers.small_run import SmallBatches, bits, same_bits, small_train_state

from diffadapt.training.checkpoint import checkpoint_io
from diffadapt.training.gradient_checks import check_precision
from diffadapt.training.loop import train
from diffadapt.training.run_log import Log

METHODS = ["lora(rank=2)", "flora(rank=2)", "liera(rank=2)", "superlora(rank=2)", "1lora", "dora(rank=2)"]


def test_a_loss_that_is_no_number_ends_the_run_with_step_pictures_and_remedy():
    train_state = small_train_state(max_train_steps=4)
    steps = train(train_state, SmallBatches(spoiled=["picture-3.png"]))
    assert next(steps).index == 1
    with pytest.raises(FloatingPointError) as caught:
        next(steps)
    message = str(caught.value)
    assert message.startswith("step 2: the loss is nan, with the images picture-2.png, picture-3.png; ")
    assert "lower --learning_rate" in message
    assert "--skip_nonfinite N (now 0)" in message


def test_only_the_microstep_that_failed_is_named():
    train_state = small_train_state(max_train_steps=1, train_batch_size=1, gradient_accumulation_steps=3)
    with pytest.raises(FloatingPointError, match=r"with the images picture-1\.png; lower"):
        next(train(train_state, SmallBatches(spoiled=["picture-1.png"])))


def test_tolerated_steps_are_left_out_and_counted(tmp_path):
    train_state = small_train_state(max_train_steps=4, skip_nonfinite=1)
    batches, before = SmallBatches(spoiled=["picture-3.png"]), None
    log = Log(tmp_path / "log.jsonl")
    for step in train(train_state, batches):
        assert step.skipped == (step.index == 2)
        assert math.isnan(step.loss) == step.skipped
        assert step.skipped == (before is not None and same_bits(before, bits(train_state)))
        before = bits(train_state)
        log.write(step=step.index, loss=step.loss)
    assert train_state.skipped == 1
    assert all(value.isfinite().all() for value in before.values())
    assert log.path.read_text(encoding="utf-8").splitlines()[1] == '{"step": 2, "loss": null}'
    with pytest.raises(FloatingPointError, match=r"--skip_nonfinite N \(now 1\)"):
        list(
            train(
                small_train_state(skip_nonfinite=1), SmallBatches(spoiled=["picture-3.png", "picture-5.png"])
            )
        )


def test_a_gradient_that_is_no_number_is_found_before_it_reaches_the_adapter():
    train_state = small_train_state(max_train_steps=2)
    before = bits(train_state)
    parameter = next(train_state.adapter.parameters())
    parameter.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(FloatingPointError, match=r"step 1: .*the norm of its gradient is (nan|inf)"):
        next(train(train_state, SmallBatches()))
    assert same_bits(before, bits(train_state))


def test_trained_tensors_below_float32_are_refused_by_name():
    train_state = small_train_state()
    check_precision(train_state.adapter)
    for parameter in train_state.adapter.parameters():
        parameter.data = parameter.data.half()
    with pytest.raises(TypeError, match=r"trained tensors are torch.float16 .*attn1\.to_q"):
        check_precision(train_state.adapter)


def test_a_tensor_that_no_gradient_reaches_is_named_after_two_steps():
    train_state = small_train_state(targets="attention+conv", max_train_steps=5)
    cut = train_state.adapter.get_parameter("parts.0.tensors.0.up")
    cut.register_hook(torch.zeros_like)
    site = train_state.adapter.parts[0].sites[0].name
    steps = train(train_state, SmallBatches())
    next(steps)
    with pytest.raises(ValueError, match="no gradient reaches") as caught:
        next(steps)
    assert site in str(caught.value)
    assert "--targets" in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_no_method_gives_a_false_alarm_not_even_at_a_rate_that_rises_from_zero(method):
    train_state = small_train_state(method, max_train_steps=10, lr_scheduler="linear", lr_warmup_steps=1)
    steps = train(train_state, SmallBatches())
    assert [next(steps).lr > 0 for _ in range(4)] == [False, True, True, True]


def test_a_gradient_scaler_finds_its_scale_without_an_alarm_and_is_resumed(tmp_path):
    """What fp16 does on a GPU, here in float32 with gradients that overflow at a large scale."""

    def make():
        train_state = small_train_state(max_train_steps=6)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        for parameter in train_state.adapter.parameters():
            parameter.register_hook(lambda grad: grad if scaler.get_scale() < 2.0**19 else grad * math.inf)
        train_state.accelerator.scaler = scaler
        optimizer = train_state.optimizer.optimizer
        train_state.optimizer = AcceleratedOptimizer(optimizer, scaler=scaler)
        train_state.accelerator.unscale_gradients = lambda: scaler.unscale_(optimizer)
        return train_state

    whole = make()
    steps = list(train(whole, SmallBatches()))
    assert [step.skipped for step in steps] == [True, True, False, False, False, False]
    assert all(math.isfinite(step.loss) for step in steps)
    assert whole.skipped == 0
    first, second = make(), make()
    assert len(list(itertools.islice(train(first, SmallBatches()), 2))) == 2
    checkpoint_io.restore_checkpoint(second, checkpoint_io.save_checkpoint(first, tmp_path))
    assert second.accelerator.scaler.get_scale() == 2.0**18
    list(train(second, SmallBatches()))
    assert same_bits(bits(whole), bits(second))
