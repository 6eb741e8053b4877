"""Small runs under SGD, for the test of several processes: writes losses, first gradients and weights.

python run_sgd.py PICTURES OUTPUT BATCH_PER_PROCESS ACCUMULATION BASE...
"""

import dataclasses
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from helpers.pipelines import train_options
from safetensors.torch import save_file

import diffadapt as da
from diffadapt.common import runtime
from diffadapt.common.images import list_images
from diffadapt.data.batches import Batches
from diffadapt.data.examples import Example
from diffadapt.models.families import load_base
from diffadapt.training.loop import initial_state, train
from diffadapt.training.objective import Objective


def main(pictures: str, output: str, batch: str, accumulation: str, *bases: str) -> None:
    """Trains on each base in turn and writes OUTPUT/BASE'S NAME.safetensors."""
    accelerator = runtime.make_accelerator(mixed_precision="no", num_threads=1)
    examples = []
    for index, path in enumerate(list_images(Path(pictures))):
        examples.append(Example(path, "a sks dog" + " on a beach" * index))  # captions of unequal lengths
    sizes = {"train_batch_size": int(batch), "gradient_accumulation_steps": int(accumulation)}
    for base in bases:
        run(accelerator, base, examples, Path(output) / f"{Path(base).name}.safetensors", sizes)
    accelerator.end_training()


def run(
    accelerator: Accelerator, base: str, examples: list[Example], output: Path, sizes: dict[str, int]
) -> None:
    model = load_base(base, device=accelerator.device, dtype=torch.float64)  # rounding hides nothing
    batches = Batches(model, examples, resolution=32, center_crop=True, seed=5)
    targets = "attention+conv" if model.denoiser_name == "unet" else "attention"
    adapter = da.attach(model.pipe, da.make_method("flora", rank=4), targets=targets, seed=0)
    objective = Objective(model.denoiser, adapter, predict=model.predict, schedule=model.training_schedule())
    train_state = initial_state(accelerator, objective, train_options(max_train_steps=20, **sizes))
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


if __name__ == "__main__":
    main(*sys.argv[1:])
