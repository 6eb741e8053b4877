"""Learning-rate schedules: diffusers' formulas, and a warm-up that is never most of a short run."""

import math

import pytest
from helpers.small_run import small_train_state

from diffadapt.training.loop import warmup_steps

STEPS, RATE = 20, 1e-3


def rates(**given):
    """The rate of every step of a run."""
    train_state = small_train_state(max_train_steps=STEPS, learning_rate=RATE, **given)
    found = []
    for _ in range(STEPS):
        found.append(train_state.scheduler.get_last_lr()[0])
        train_state.optimizer.step()
        train_state.scheduler.step()
    return found


def test_a_warm_up_is_at_most_a_tenth_of_the_run():
    found = rates(lr_scheduler="constant_with_warmup", lr_warmup_steps=500)
    assert found == pytest.approx([0, RATE / 2, *[RATE] * 18])
    assert rates(lr_scheduler="constant_with_warmup", lr_warmup_steps=1) == pytest.approx([0, *[RATE] * 19])
    short = small_train_state(max_train_steps=9, lr_scheduler="linear", lr_warmup_steps=5)
    assert warmup_steps(short.options) == 0


def test_cosine_restarts_as_often_as_asked_for():
    found = rates(lr_scheduler="cosine_with_restarts", lr_num_cycles=4)
    expected = [RATE * 0.5 * (1 + math.cos(math.pi * (step % 5) / 5)) for step in range(STEPS)]
    assert found == pytest.approx(expected)


def test_the_polynomial_has_the_power_asked_for():
    last = 1e-7  # of diffusers
    found = rates(lr_scheduler="polynomial", lr_power=3.0)
    assert found == pytest.approx([(RATE - last) * (1 - s / STEPS) ** 3 + last for s in range(STEPS)])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr_scheduler": "constant", "lr_warmup_steps": 2}, "--lr_warmup_steps 2 has no effect"),
        ({"lr_scheduler": "cosine", "lr_num_cycles": 3}, "--lr_num_cycles 3 has no effect"),
        ({"lr_scheduler": "linear", "lr_power": 2.0}, "--lr_power 2.0 has no effect"),
    ],
)
def test_settings_that_a_schedule_does_not_use_are_refused_in_python_too(given, message):
    with pytest.raises(ValueError, match=message):
        small_train_state(max_train_steps=STEPS, **given)
