"""DreamBooth: teach a Stable Diffusion 1.x/2.x model one subject from a few pictures, with any adapter.

    accelerate launch train_scripts/dreambooth.py --adapter flora

Without a base and without data it is a demonstration on the embedded 64-pixel base. Method: arXiv 2208.12242.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

import diffadapt as da
from diffadapt.data.batches import Batches
from diffadapt.data.class_images import class_examples
from diffadapt.data.examples import folder_examples
from diffadapt.exits import run
from diffadapt.export import parse_formats, write_formats
from diffadapt.models import sd
from diffadapt.models.names import resolve
from diffadapt.training import session, state
from diffadapt.training.loop import Trainer, prepare, train
from diffadapt.training.objective import Objective
from diffadapt.training.options import (
    TrainOptions,
    build_method,
    choose_base,
    filled,
    option,
    parse,
    recommended_rate,
)
from diffadapt.training.record import Progress
from diffadapt.training.stop import StopRequest
from diffadapt.training.subject import SubjectReport
from diffadapt.training.summary import before_training

DEMO = {
    "pretrained_model_name_or_path": "embedded:emoji",
    "instance_data_dir": "embedded:subjects/cat",
    "instance_prompt": "a sks cat face emoji",
    "class_prompt": "a cat face emoji",
}
FULL_COMMAND = (
    "accelerate launch train_scripts/dreambooth.py --adapter flora --pretrained_model_name_or_path BASE "
    '--instance_data_dir PICTURES --instance_prompt "a photo of sks dog" --output_dir runs/dog'
)


@dataclass(frozen=True)
class Options(TrainOptions):
    """Options of this script."""

    output_dir: str = option("runs/dreambooth", "where everything is written")
    instance_data_dir: str | None = option(None, "folder of pictures of the subject")
    instance_prompt: str | None = option(None, "what they show, with a rare word: a photo of sks dog")
    class_prompt: str | None = option(None, "the same without the rare word: a photo of a dog")
    class_data_dir: str | None = option(None, "folder of class pictures; the base draws missing ones")
    with_prior_preservation: bool = option(
        False, "train on class pictures too, so that they stay as they are"
    )
    prior_loss_weight: float = option(1.0, "weight of their loss")
    num_class_images: int = option(100, "how many class pictures there should be")


def main() -> int:
    """One run from options to pictures. Returns the exit code."""
    session.quiet()
    started = time.perf_counter()
    options = parse(Options, description=__doc__.splitlines()[0])
    options = choose_base(options, DEMO, data="instance_data_dir", command=FULL_COMMAND)
    if options.with_prior_preservation and not options.class_prompt:
        raise ValueError('--with_prior_preservation needs --class_prompt, as "a photo of a dog"')
    parse_formats(options.export_formats)
    method = build_method(options)
    accelerator = session.start(mixed_precision=options.mixed_precision, num_threads=options.num_threads)
    model = sd.load(
        options.pretrained_model_name_or_path,
        device=accelerator.device,
        dtype=session.weight_dtype(accelerator),
        revision=options.revision,
        variant=options.variant,
    )
    rate = recommended_rate(options, method)
    options = filled(options, {"resolution": model.resolution, "learning_rate": rate})
    report = SubjectReport(model, options, autocast=session.autocast_dtype(accelerator))
    batches = encode_data(accelerator, model, options, report)
    adapter = da.attach(model.pipe, method, targets=options.targets, seed=options.seed)
    prior = options.prior_loss_weight if options.with_prior_preservation else None
    schedule = model.training_schedule()
    objective = Objective(model.denoiser, adapter, predict=sd.predict, schedule=schedule, prior_weight=prior)
    trainer = prepare(accelerator, objective, options)
    if options.resume_from_checkpoint:
        state.restore(trainer, state.find(options.resume_from_checkpoint, options.output_dir))
    if accelerator.is_main_process:
        print(before_training(trainer, data=batches.description))
        with da.disabled(model.pipe):
            report.begin()
    code = fit(trainer, batches)
    if code == 0 and accelerator.is_main_process:
        path = state.save_adapter(trainer, options.output_dir)
        da.detach(adapter)
        adapter = da.load(model.pipe, path)  # pictures are made through the file, as by `diffadapt sample`
        print(report.finish(adapter, seconds=lambda: time.perf_counter() - started))
        for line in write_formats(adapter, path, options.export_formats):
            print(line)
    accelerator.wait_for_everyone()
    return code


def encode_data(
    accelerator: Accelerator, model: sd.StableDiffusion, options: Options, report: SubjectReport
) -> Batches:
    """The pictures of the subject and, for prior preservation, of its class."""
    instances, classes = folder_examples(resolve(options.instance_data_dir), options.instance_prompt), []
    if options.with_prior_preservation:
        folder = options.class_data_dir or Path(options.output_dir) / "class_images"
        wanted = {"prompt": options.class_prompt, "count": options.num_class_images, "seed": options.seed}
        with accelerator.main_process_first():
            classes = class_examples(model.pipe, folder, sampler=report.sampler, **wanted)
    return Batches(
        model,
        instances,
        classes=classes,
        resolution=options.resolution,
        center_crop=options.center_crop,
        seed=options.seed,
    )


def fit(trainer: Trainer, batches: Batches) -> int:
    """Trains to the end of the run. Returns 0, or 128 + the signal that stopped it."""
    options, accelerator = trainer.options, trainer.accelerator
    with StopRequest() as stop, Progress(trainer) as progress:
        for step in train(trainer, batches):
            progress.show(step)
            signal = stop.agreed(accelerator)
            if signal or step.index % options.checkpointing_steps == 0:
                state.save(trainer, options.output_dir)
            if signal:
                progress.say("stopped; to go on: the same command with --resume_from_checkpoint latest")
                return 128 + signal
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
