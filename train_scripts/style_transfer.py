"""Style transfer: teach a Stable Diffusion model the look of captioned pictures, with any adapter.

    accelerate launch --config_file accelerate_config.yaml train_scripts/style_transfer.py --adapter flora

Without a base and without data it is a demonstration: the embedded 64-pixel base learns the Fluent 3D style.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from diffadapt.common.exit_codes import run_command
from diffadapt.data.buckets import Buckets, bucket_sizes, size_step
from diffadapt.data.examples import Example
from diffadapt.data.folders import captioned_folder
from diffadapt.data.hub_tables import captioned_table, open_table
from diffadapt.data.stream import Stream
from diffadapt.models.base_names import resolve
from diffadapt.training.base_defaults import choose_base
from diffadapt.training.options import TrainOptions, option
from diffadapt.training.parsing import parse
from diffadapt.training.report.style import StyleReport
from diffadapt.training.run import Run
from diffadapt.training.setup import Setup, make_batches, make_trainer, set_up
from diffadapt.training.start_command import start_command

DEMO = {
    "pretrained_model_name_or_path": "embedded:emoji",
    "train_data_dir": "embedded:style/fluent3d/train",
    "validation_data_dir": "embedded:style/fluent3d/held_out",
    "num_validation_images": 48,
}
FULL_COMMAND = (
    f"{start_command('style_transfer')} --adapter flora --pretrained_model_name_or_path BASE "
    "--train_data_dir CAPTIONED_PICTURES --output_dir runs/style"
)


@dataclass(frozen=True)
class Options(TrainOptions):
    """Options of this script."""

    output_dir: str = option("runs/style", "where everything is written")
    train_data_dir: str | None = option(
        None, "folder of pictures with metadata.jsonl, metadata.csv, or a .txt file beside each"
    )
    dataset_name: str | None = option(None, "instead: a data set on the hub, or the folder of a saved one")
    dataset_config_name: str | None = option(None, "configuration of that data set")
    split: str = option("train", "which split of that data set is trained on")
    image_column: str | None = option(
        None, "column of pictures; default: file_name, or the first of pictures"
    )
    caption_column: str | None = option(None, "column of captions; default: text, caption or prompt")
    max_train_samples: int | None = option(None, "use only the first so many pictures")
    validation_data_dir: str | None = option(
        None, "captioned pictures that are not trained on: figures and pictures are made of them"
    )
    trigger_word: str | None = option(None, "a rare word put before every caption, to call the style by")
    caption_dropout: float = option(0.0, "share of samples told an empty caption, for guidance")
    aspect_ratio_buckets: str | None = option(
        None, 'pictures keep their shape: auto, or sizes in pixels as "512,512;640,384" (height,width)'
    )
    streaming: bool = option(False, "for sets larger than memory: read, check and encode pictures when used")
    shuffle_buffer: int = option(1000, "samples of a streamed data set that are held and shuffled together")


def main() -> int:
    """One run from options to pictures. Returns the exit code."""
    options = parse(Options, description=__doc__.splitlines()[0])
    data = "dataset_name" if options.dataset_name else "train_data_dir"
    options = choose_base(options, DEMO, data=data, command=FULL_COMMAND)
    examples, held_out = training_examples(options), []
    if options.validation_data_dir:
        held_out = captioned_folder(
            resolve(options.validation_data_dir), **reading(options), with_other_columns=True
        )
    setup = set_up(options)
    batches = make_batches(
        setup,
        examples,
        trigger_word=options.trigger_word,
        caption_dropout=options.caption_dropout,
        buckets=buckets(setup),
        is_streaming=options.streaming,
    )
    report = StyleReport(setup, batches, held_out)
    training = Run(make_trainer(setup), batches, report)
    for step in training.steps():
        training.log(step)
        training.validate(step)
        training.save(step)
    return training.exit_code


def training_examples(options: Options) -> Sequence[Example] | Stream:
    """Captioned pictures from a folder or a data set."""
    if options.dataset_name is None:
        examples = captioned_folder(resolve(options.train_data_dir), **reading(options))
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
    order = {"seed": options.seed, "buffer": options.shuffle_buffer}
    columns = {"image_column": options.image_column, "caption_column": options.caption_column}
    return captioned_table(table, name=name, **columns, **order)


def reading(options: Options) -> dict[str, object]:
    """How folders are read, for training and validation alike."""
    return {
        "image_column": options.image_column,
        "caption_column": options.caption_column,
        "follow_links": options.follow_links,
    }


def buckets(setup: Setup[Options]) -> Buckets | None:
    """The sizes of `--aspect_ratio_buckets`; all samples of an optimizer step share one."""
    options = setup.options
    if options.aspect_ratio_buckets is None:
        return None
    step = size_step(setup.model)
    sizes = bucket_sizes(options.aspect_ratio_buckets, resolution=options.resolution, step=step)
    samples = options.train_batch_size * options.gradient_accumulation_steps
    return Buckets(sizes, samples * setup.accelerator.num_processes)


if __name__ == "__main__":
    sys.exit(run_command(main))
