"""DreamBooth: teach a text-to-image model one subject from a few images, with any adapter.

The demonstration on the embedded 64-pixel base (no downloads):

    accelerate launch --config_file accelerate_config.yaml train_scripts/dreambooth.py --adapter flora

Your own images on Stable Diffusion:

    accelerate launch --config_file accelerate_config.yaml train_scripts/dreambooth.py --adapter flora \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --instance_data_dir IMAGES --instance_prompt "a photo of sks dog" --output_dir runs/dog

With prior preservation, which keeps other dogs as they are:

    ... --with_prior_preservation --class_prompt "a photo of a dog"

Paper: DreamBooth, Ruiz et al. 2022, arXiv 2208.12242.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from diffadapt.common.exit_codes import run_command
from diffadapt.data.batches import Batches
from diffadapt.data.class_images import ClassRecipe, class_examples, planned_class_examples
from diffadapt.data.examples import Example
from diffadapt.data.folders import read_instance_folder
from diffadapt.models.base_names import resolve
from diffadapt.training.base_defaults import complete_options
from diffadapt.training.options import TrainOptions, option
from diffadapt.training.parsing import parse
from diffadapt.training.report.subject import SubjectReport
from diffadapt.training.run import Run
from diffadapt.training.setup import Setup, make_batches, make_train_state, prepare_run
from diffadapt.training.start_command import start_command

DEMO = {
    "pretrained_model_name_or_path": "embedded:emoji",
    "instance_data_dir": "embedded:subjects/cat",
    "instance_prompt": "a sks cat face emoji",
    "class_prompt": "a cat face emoji",
}
FULL_COMMAND = (
    f"{start_command('dreambooth')} --adapter flora --pretrained_model_name_or_path BASE "
    '--instance_data_dir IMAGES --instance_prompt "a photo of sks dog" --output_dir runs/dog'
)


@dataclass(frozen=True)
class Options(TrainOptions):
    """DreamBooth"""

    output_dir: str = option("runs/dreambooth", "folder for checkpoints, images and the final adapter")
    instance_data_dir: str | None = option(None, "folder of images of the subject")
    instance_prompt: str | None = option(
        None, 'prompt for these images, with a rare word that identifies the subject: "a photo of sks dog"'
    )
    instance_captions: bool = option(
        False,
        "use each image's own caption from a metadata or .txt file; --instance_prompt where there is none",
    )
    class_prompt: str | None = option(
        None, 'the same prompt without the identifier, for class images: "a photo of a dog"'
    )
    class_data_dir: str | None = option(
        None,
        "folder of class images; missing ones are generated with the base model (default: "
        "OUTPUT_DIR/class_images)",
    )
    with_prior_preservation: bool = option(
        False, "also train on class images, so that the model does not forget the class"
    )
    prior_loss_weight: float = option(1.0, "weight of the prior-preservation loss")
    num_class_images: int = option(100, "number of class images for prior preservation")


def main() -> int:
    """Trains an adapter and returns the exit code."""
    options = parse(Options, description=__doc__.splitlines()[0])
    options = complete_options(options, DEMO, data="instance_data_dir", command=FULL_COMMAND)
    if options.with_prior_preservation and not options.class_prompt:
        raise ValueError('--with_prior_preservation needs --class_prompt, as "a photo of a dog"')
    setup = prepare_run(options)
    report = SubjectReport(setup)
    batches = encode_data(setup, report)
    prior_weight = options.prior_loss_weight if options.with_prior_preservation else None
    train_state = make_train_state(setup, prior_weight=prior_weight)
    training = Run(train_state, batches, report)
    for step in training.steps():
        training.log(step)
        training.validate(step)
        training.save(step)
    return training.exit_code


def encode_data(setup: Setup[Options], report: SubjectReport) -> Batches:
    """Encodes the images of the subject and, for prior preservation, of its class."""
    options = setup.options
    instances = read_instance_folder(
        resolve(options.instance_data_dir),
        options.instance_prompt,
        with_captions=options.instance_captions,
        follow_links=options.follow_links,
    )
    classes = class_images(setup, report) if options.with_prior_preservation else []
    prompts = [request.prompt for request in report.all_requests()]
    return make_batches(setup, instances, prompts=prompts, classes=classes)


def class_images(setup: Setup[Options], report: SubjectReport) -> list[Example]:
    """The images of the class; the base generates missing ones, which a dry run only counts."""
    options = setup.options
    folder = options.class_data_dir or Path(options.output_dir) / "class_images"
    sampler = replace(report.sampler, height=None, width=None)  # at the size of the base
    recipe = ClassRecipe(options.class_prompt, options.pretrained_model_name_or_path, sampler)
    settings = {"count": options.num_class_images, "follow_links": options.follow_links}
    if options.dry_run:
        return planned_class_examples(folder, recipe, side=setup.model.resolution, **settings)
    with setup.accelerator.main_process_first():
        return class_examples(setup.model, folder, recipe, seed=options.seed, **settings)


if __name__ == "__main__":
    sys.exit(run_command(main))
