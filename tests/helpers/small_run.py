"""A run without files: a tiny denoiser, and batches that are a function of the position."""

import torch
from accelerate import Accelerator
from helpers.pipelines import WIDTH, tiny_unet, train_options

import diffadapt as da
from diffadapt.common.keyed_random import integer, normal
from diffadapt.data.batches import Batch
from diffadapt.models.beta_schedule import BetaSchedule
from diffadapt.training.loop import initial_state
from diffadapt.training.objective import Objective


class SmallBatches:
    """Latents, noise and states by position; pictures named `spoiled` hold a value that is not a number."""

    description = "made up"

    def __init__(self, spoiled=()):
        self.spoiled = spoiled

    def read_ahead(self, positions):
        """Nothing is read from files."""

    def batch(self, positions):
        latents = torch.stack([normal(("latents", p % 5), (4, 8, 8)) for p in positions])
        for row, name in enumerate(self.names(positions)):
            if name in self.spoiled:
                latents[row, 0, 0, 0] = float("nan")
        return Batch(
            latents=latents,
            noise=torch.stack([normal(("noise", p), (4, 8, 8)) for p in positions]),
            timesteps=torch.tensor([integer(("timestep", p), 1000) for p in positions]),
            conditions={
                "encoder_hidden_states": normal(("words",), (1, 6, WIDTH)).repeat(len(positions), 1, 1)
            },
        )

    def names(self, positions):
        return [f"picture-{p}.png" for p in positions]


def predict(denoiser, noisy, timesteps, conditions):
    return denoiser(noisy, timesteps, return_dict=False, **conditions)[0]


def small_train_state(method="lora(rank=2)", *, targets="attention", objective=None, **given):
    """A train_state at step 0."""
    torch.manual_seed(0)
    denoiser = tiny_unet()
    adapter = da.attach(denoiser, da.make_method(method), targets)
    schedule = BetaSchedule(**(objective or {}))
    made = Objective(denoiser, adapter, predict=predict, schedule=schedule, snr_gamma=given.get("snr_gamma"))
    return initial_state(Accelerator(cpu=True), made, train_options(**given))


def bits(train_state):
    """Every trained tensor, copied."""
    return {name: value.detach().clone() for name, value in train_state.adapter.state_dict().items()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
