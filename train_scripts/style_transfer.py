"""Text-to-image fine-tuning: teach a model the style of captioned images, with any adapter.

The demonstration on the embedded 64-pixel base, which learns the Fluent 3D style (no downloads):

    accelerate launch --config_file accelerate_config.yaml train_scripts/style_transfer.py --adapter flora

Your own captioned images, or a data set on the hub, on Stable Diffusion:

    accelerate launch --config_file accelerate_config.yaml train_scripts/style_transfer.py --adapter flora \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --train_data_dir CAPTIONED_IMAGES --output_dir runs/style

    ... --dataset_name USER/NAME --caption_column text

Paper: latent diffusion models, Rombach et al. 2022, arXiv 2112.10752.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from diffadapt.common.exit_codes import run_command
from diffadapt.data.buckets import Buckets, bucket_sizes
from diffadapt.data.examples import Example
from diffadapt.data.folders import read_captioned_folder
from diffadapt.data.hub_tables import open_table, read_captioned_table
from diffadapt.data.stream import Stream
from diffadapt.data.trigger_words import add_trigger_word
from diffadapt.models.base_names import resolve
from diffadapt.training.base_defaults import complete_options
from diffadapt.training.options import TrainOptions, option
from diffadapt.training.parsing import parse
from diffadapt.training.report.style import StyleReport
from diffadapt.training.run import Run
from diffadapt.training.setup import Setup, make_batches, make_train_state, prepare_run
from diffadapt.training.start_command import start_command

DEMO = {
    "pretrained_model_name_or_path": "embedded:emoji",
    "train_data_dir": "embedded:style/fluent3d/train",
    "validation_data_dir": "embedded:style/fluent3d/held_out",
    "num_validation_images": 48,
}
FULL_COMMAND = (
    f"{start_command('style_transfer')} --adapter flora --pretrained_model_name_or_path BASE "
    "--train_data_dir CAPTIONED_IMAGES --output_dir runs/style"
)


@dataclass(frozen=True)
class Options(TrainOptions):
    """Captioned images"""

    output_dir: str = option("runs/style", "folder for checkpoints, images and the final adapter")
    train_data_dir: str | None = option(
        None,
        "folder of images with captions in metadata.jsonl, metadata.csv or a .txt file per image",
    )
    dataset_name: str | None = option(
        None, "instead of --train_data_dir: data set on the hub, or folder of a saved one"
    )
    dataset_config_name: str | None = option(None, "configuration of the data set")
    split: str = option("train", "split of the data set to train on")
    image_column: str | None = option(
        None, "column with the images (default: file_name, or the first column of images)"
    )
    caption_column: str | None = option(
        None, "column with the captions (default: text, caption or prompt, whichever exists)"
    )
    max_train_samples: int | None = option(None, "train on the first N images only (default: all)")
    validation_data_dir: str | None = option(
        None, "folder of held-out captioned images, used for metrics and for images before and after training"
    )
    trigger_word: str | None = option(
        None, "word to prepend to every caption, which later invokes the style in prompts"
    )
    caption_dropout: float = option(
        0.0, "fraction of samples trained with an empty caption, for classifier-free guidance"
    )
    aspect_ratio_buckets: str | None = option(
        None,
        "train at several sizes that keep the images' aspect ratios: auto, or a list of HEIGHT,WIDTH in "
        'pixels such as "512,512;640,384" (default: square crops)',
    )
    streaming: bool = option(
        False, "read, check and encode images when they are needed, for data sets larger than memory"
    )
    shuffle_buffer: int = option(1000, "number of samples in the shuffle buffer of a streamed data set")


def main() -> int:
    """Trains an adapter and returns the exit code."""
    options = parse(Options, description=__doc__.splitlines()[0])
    data = "dataset_name" if options.dataset_name else "train_data_dir"
    options = complete_options(options, DEMO, data=data, command=FULL_COMMAND)
    examples = training_examples(options)
    held_out = held_out_examples(options)
    setup = prepare_run(options)
    batches = make_batches(
        setup,
        examples,
        prompts=prompts_besides_training(options, held_out),
        trigger_word=options.trigger_word,
        caption_dropout=options.caption_dropout,
        buckets=make_buckets(setup),
        is_streaming=options.streaming,
    )
    report = StyleReport(setup, batches, held_out)
    training = Run(make_train_state(setup), batches, report)
    for step in training.steps():
        training.log(step)
        training.validate(step)
        training.save(step)
    return training.exit_code


def training_examples(options: Options) -> Sequence[Example] | Stream:
    """Reads the captioned images of a folder or a data set."""
    if options.dataset_name is None:
        examples = read_captioned_folder(
            resolve(options.train_data_dir),
            image_column=options.image_column,
            caption_column=options.caption_column,
            follow_links=options.follow_links,
        )
        return examples[: options.max_train_samples]
    if options.train_data_dir is not None:
        raise ValueError("give --train_data_dir or --dataset_name, not both")
    name = resolve(options.dataset_name)
    table = open_table(
        name,
        config_name=options.dataset_config_name,
        split=options.split,
        is_streaming=options.streaming,
    )
    if options.max_train_samples is not None:
        table = table.take(options.max_train_samples)
    return read_captioned_table(
        table,
        name=name,
        image_column=options.image_column,
        caption_column=options.caption_column,
        seed=options.seed,
        buffer=options.shuffle_buffer,
    )


def held_out_examples(options: Options) -> list[Example]:
    """Reads the captioned images of `--validation_data_dir`; none without it."""
    if not options.validation_data_dir:
        return []
    return read_captioned_folder(
        resolve(options.validation_data_dir),
        image_column=options.image_column,
        caption_column=options.caption_column,
        follow_links=options.follow_links,
        with_other_columns=True,
    )


def prompts_besides_training(options: Options, held_out: Sequence[Example]) -> list[str]:
    """The captions that the run reads besides those of the training images."""
    prompts = [add_trigger_word(example.caption, options.trigger_word) for example in held_out]
    if options.validation_prompt:
        prompts.append(options.validation_prompt)
    return prompts


def make_buckets(setup: Setup[Options]) -> Buckets | None:
    """The sizes of `--aspect_ratio_buckets`; all samples of an optimizer step share one."""
    options = setup.options
    if options.aspect_ratio_buckets is None:
        return None
    step = setup.model.size_multiple
    sizes = bucket_sizes(options.aspect_ratio_buckets, resolution=options.resolution, step=step)
    samples = options.train_batch_size * options.gradient_accumulation_steps
    return Buckets(sizes, samples * setup.accelerator.num_processes)


if __name__ == "__main__":
    sys.exit(run_command(main))
