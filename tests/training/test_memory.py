"""The memory estimate against what a step really keeps."""

from types import SimpleNamespace

import pytest
import torch
from helpers.quantised_kinds import IN, OUT, QUANTISED, needs
from helpers.small_run import SmallBatches, bits, same_bits, small_train_state

from diffadapt.adapters.quantised_layers import stored_bytes
from diffadapt.training.loop import train
from diffadapt.training.memory import estimate_memory


def estimate(train_state):
    return estimate_memory(
        train_state, SmallBatches(), SimpleNamespace(components={"unet": train_state.objective.denoiser})
    )


def test_weights_gradients_and_states_are_counted():
    train_state = small_train_state(use_ema=True)
    memory, denoiser = estimate(train_state), train_state.objective.denoiser
    assert memory.base == 4 * sum(p.numel() for p in denoiser.parameters())
    list(train(train_state, SmallBatches()))
    state = [v for s in train_state.optimizer.state.values() for v in s.values() if v.dim() > 0]
    held = [
        *train_state.adapter.parameters(),
        *train_state.adapter.parameters(),
        *state,
        *train_state.average.state()["values"],
    ]
    assert memory.training == sum(4 * tensor.numel() for tensor in held)
    assert memory.total == memory.base + memory.training + memory.activations


@pytest.mark.parametrize(("name", "values"), [("prodigy", 4), ("adamw", 2)])
def test_what_an_optimizer_keeps_is_known(name, values):
    train_state = small_train_state(optimizer=name, max_train_steps=1)
    list(train(train_state, SmallBatches()))
    state = sum(
        v.numel() for s in train_state.optimizer.state.values() for v in s.values() if torch.is_tensor(v)
    )
    per_value = state / train_state.adapter.num_parameters
    assert 0.85 * values < per_value < 1.01 * values  # Prodigy keeps no start of tensors that start at zero


def test_activations_grow_with_the_batch_shrink_with_checkpointing_and_change_nothing():
    one, four = small_train_state(train_batch_size=1), small_train_state(train_batch_size=4)
    before = bits(four)
    small, large = estimate(one).activations, estimate(four).activations
    assert same_bits(before, bits(four))
    assert all(p.grad is None for p in four.adapter.parameters())
    assert large == pytest.approx(4 * small, rel=0.1)
    assert (
        estimate(small_train_state(train_batch_size=4, gradient_checkpointing=True)).activations < large / 2
    )


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=needs(kind), id=name) for name, kind in QUANTISED.items()]
)
def test_quantised_weights_count_by_their_real_bytes(kind):
    layer = kind.layer()
    parts = {"bnb-nf4": 4.5, "bnb-fp4": 4.5, "gguf-q4": 4.5, "gguf-q8": 8.5}  # bits of a value with its scale
    bits_per_value = stored_bytes(layer.weight) * 8 / (IN * OUT)
    assert bits_per_value == pytest.approx(parts.get(kind.name, 8.5), rel=0.1)
