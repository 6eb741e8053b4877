"""A small run under SGD, for the test of several processes: writes losses, first gradients and weights.

python run_sgd.py BASE PICTURES OUTPUT BATCH_PER_PROCESS
"""

import dataclasses
import sys

import torch
from helpers.pipelines import train_options
from safetensors.torch import save_file

import diffadapt as da
from diffadapt.common import runtime
from diffadapt.data.batches import Batches
from diffadapt.data.examples import folder_examples
from diffadapt.models.families import load_base
from diffadapt.training.loop import initial_state, train
from diffadapt.training.objective import Objective


def main(base: str, pictures: str, output: str, batch: str) -> None:
    accelerator = runtime.make_accelerator(mixed_precision="no", num_threads=1)
    model = load_base(base, device=accelerator.device, dtype=torch.float64)  # rounding hides nothing
    batches = Batches(model, folder_examples(pictures, "a sks dog"), resolution=32, center_crop=True, seed=5)
    adapter = da.attach(model.pipe, da.make_method("flora", rank=4), targets="attention+conv", seed=0)
    objective = Objective(model.denoiser, adapter, predict=model.predict, schedule=model.training_schedule())
    train_state = initial_state(
        accelerator, objective, train_options(train_batch_size=int(batch), max_train_steps=20)
    )
    parameters = list(adapter.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    first: dict[str, torch.Tensor] = {}

    def note(*_: object) -> None:
        if not first:
            first.update({f"gradient.{i}": p.grad.detach().clone() for i, p in enumerate(parameters)})

    optimizer.register_step_pre_hook(note)
    train_state = dataclasses.replace(train_state, optimizer=accelerator.prepare(optimizer))
    losses = [step.loss for step in train(train_state, batches)]
    if accelerator.is_main_process:
        weights = {f"weight.{i}": p.detach().clone() for i, p in enumerate(parameters)}
        processes = torch.tensor(accelerator.num_processes)
        save_file({**weights, **first, "losses": torch.tensor(losses), "processes": processes}, output)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
