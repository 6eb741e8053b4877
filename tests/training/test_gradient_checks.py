"""Runs that could only waste time end at once, with what is wrong and the remedy."""

import itertools
import math

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from helpers.small_run import SmallBatches, bits, same_bits, small_trainer

from diffadapt.training.checkpoint import state
from diffadapt.training.gradient_checks import check_precision
from diffadapt.training.loop import train
from diffadapt.training.run_log import Log

METHODS = ["lora(rank=2)", "flora(rank=2)", "liera(rank=2)", "superlora(rank=2)", "1lora", "dora(rank=2)"]


def test_a_loss_that_is_no_number_ends_the_run_with_step_pictures_and_remedy():
    trainer = small_trainer(max_train_steps=4)
    steps = train(trainer, SmallBatches(spoiled=["picture-3.png"]))
    assert next(steps).index == 1
    with pytest.raises(FloatingPointError) as caught:
        next(steps)
    message = str(caught.value)
    assert message.startswith("step 2: the loss is nan, with the pictures picture-2.png, picture-3.png; ")
    assert "lower --learning_rate" in message
    assert "--skip_nonfinite N (now 0)" in message


def test_only_the_microstep_that_failed_is_named():
    trainer = small_trainer(max_train_steps=1, train_batch_size=1, gradient_accumulation_steps=3)
    with pytest.raises(FloatingPointError, match=r"with the pictures picture-1\.png; lower"):
        next(train(trainer, SmallBatches(spoiled=["picture-1.png"])))


def test_tolerated_steps_are_left_out_and_counted(tmp_path):
    trainer = small_trainer(max_train_steps=4, skip_nonfinite=1)
    batches, before = SmallBatches(spoiled=["picture-3.png"]), None
    log = Log(tmp_path / "log.jsonl")
    for step in train(trainer, batches):
        assert step.skipped == (step.index == 2)
        assert math.isnan(step.loss) == step.skipped
        assert step.skipped == (before is not None and same_bits(before, bits(trainer)))
        before = bits(trainer)
        log.write(step=step.index, loss=step.loss)
    assert trainer.skipped == 1
    assert all(value.isfinite().all() for value in before.values())
    assert log.path.read_text(encoding="utf-8").splitlines()[1] == '{"step": 2, "loss": null}'
    with pytest.raises(FloatingPointError, match=r"--skip_nonfinite N \(now 1\)"):
        list(train(small_trainer(skip_nonfinite=1), SmallBatches(spoiled=["picture-3.png", "picture-5.png"])))


def test_a_gradient_that_is_no_number_is_found_before_it_reaches_the_adapter():
    trainer = small_trainer(max_train_steps=2)
    before = bits(trainer)
    parameter = next(trainer.adapter.parameters())
    parameter.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(FloatingPointError, match=r"step 1: .*the norm of its gradient is (nan|inf)"):
        next(train(trainer, SmallBatches()))
    assert same_bits(before, bits(trainer))


def test_trained_tensors_below_float32_are_refused_by_name():
    trainer = small_trainer()
    check_precision(trainer.adapter)
    for parameter in trainer.adapter.parameters():
        parameter.data = parameter.data.half()
    with pytest.raises(TypeError, match=r"trained tensors are torch.float16 .*attn1\.to_q"):
        check_precision(trainer.adapter)


def test_a_tensor_that_no_gradient_reaches_is_named_after_two_steps():
    trainer = small_trainer(targets="attention+conv", max_train_steps=5)
    cut = trainer.adapter.get_parameter("parts.0.tensors.0.up")
    cut.register_hook(torch.zeros_like)
    site = trainer.adapter.parts[0].sites[0].name
    steps = train(trainer, SmallBatches())
    next(steps)
    with pytest.raises(ValueError, match="no gradient reaches") as caught:
        next(steps)
    assert site in str(caught.value)
    assert "--targets" in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_no_method_gives_a_false_alarm_not_even_at_a_rate_that_rises_from_zero(method):
    trainer = small_trainer(method, max_train_steps=10, lr_scheduler="linear", lr_warmup_steps=1)
    steps = train(trainer, SmallBatches())
    assert [next(steps).lr > 0 for _ in range(4)] == [False, True, True, True]


def test_a_gradient_scaler_finds_its_scale_without_an_alarm_and_is_resumed(tmp_path):
    """What fp16 does on a GPU, here in float32 with gradients that overflow at a large scale."""

    def make():
        trainer = small_trainer(max_train_steps=6)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        for parameter in trainer.adapter.parameters():
            parameter.register_hook(lambda grad: grad if scaler.get_scale() < 2.0**19 else grad * math.inf)
        trainer.accelerator.scaler = scaler
        optimizer = trainer.optimizer.optimizer
        trainer.optimizer = AcceleratedOptimizer(optimizer, scaler=scaler)
        trainer.accelerator.unscale_gradients = lambda: scaler.unscale_(optimizer)
        return trainer

    whole = make()
    steps = list(train(whole, SmallBatches()))
    assert [step.skipped for step in steps] == [True, True, False, False, False, False]
    assert all(math.isfinite(step.loss) for step in steps)
    assert whole.skipped == 0
    first, second = make(), make()
    assert len(list(itertools.islice(train(first, SmallBatches()), 2))) == 2
    state.restore(second, state.save(first, tmp_path))
    assert second.accelerator.scaler.get_scale() == 2.0**18
    list(train(second, SmallBatches()))
    assert same_bits(bits(whole), bits(second))
