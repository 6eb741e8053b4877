"""Class-conditional fine-tuning: adapt a UNet2DModel or DiT to new images or classes, with any adapter.

The demonstration on the embedded 16-pixel base, SuperLoRA's experiment in small: a base model that knows
colourful printed digits learns handwriting (no downloads, a minute or two on a CPU):

    accelerate launch --config_file accelerate_config.yaml train_scripts/class_conditional.py \\
        --adapter superlora

Your own classes, one folder of images each, on DiT:

    accelerate launch --config_file accelerate_config.yaml train_scripts/class_conditional.py \\
        --adapter "lora(rank=16)" --pretrained_model_name_or_path facebook/DiT-XL-2-256 \\
        --train_data_dir CLASS_FOLDERS --new_class_table --output_dir runs/classes

Papers: SuperLoRA, arXiv 2403.11887; DiT, Peebles and Xie 2022, arXiv 2212.09748; classifier-free guidance, Ho
and Salimans 2022, arXiv 2207.12598.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from diffadapt.common.exit_codes import run_command
from diffadapt.data.examples import Example
from diffadapt.data.folders import read_class_folders
from diffadapt.data.hub_tables import open_table, read_labelled_table
from diffadapt.models.base_names import resolve
from diffadapt.training.base_defaults import complete_options
from diffadapt.training.options import TrainOptions, option
from diffadapt.training.parsing import parse
from diffadapt.training.report.class_mapping import (
    class_table_rows,
    match_by_name,
    names_by_row,
    with_new_class_table,
)
from diffadapt.training.report.classes import ClassReport
from diffadapt.training.run import Run
from diffadapt.training.setup import make_batches, make_train_state, prepare_run
from diffadapt.training.start_command import start_command

DEMO = {
    "pretrained_model_name_or_path": "embedded:digits",
    "dataset_name": "embedded:handwriting",
    "held_out": "test",
}
FULL_COMMAND = (
    f"{start_command('class_conditional')} --adapter superlora "
    "--pretrained_model_name_or_path BASE --train_data_dir CLASS_FOLDERS --output_dir runs/classes"
)
Data = tuple[list[Example], list[str]]  # examples with class numbers, and the names of the classes


@dataclass(frozen=True)
class Options(TrainOptions):
    """Images and classes"""

    output_dir: str = option("runs/class_conditional", "folder for checkpoints, images and the final adapter")
    adapter: str = option(
        "superlora", "adapter method, such as flora or flora(rank=8); `diffadapt methods` lists all methods"
    )
    export_formats: str | None = option(
        "none",
        "also export the adapter for other programs, comma-separated: diffusers (DiT only), merged, or none",
    )
    train_data_dir: str | None = option(None, "folder with one folder of images per class")
    dataset_name: str | None = option(
        None, "instead of --train_data_dir: data set on the hub, or folder of a saved one or of its files"
    )
    dataset_config_name: str | None = option(
        None, "configuration of the data set, such as cropped_digits of svhn"
    )
    split: str = option("train", "split of the data set to train on")
    image_column: str | None = option(None, "column with the images (default: the first column of images)")
    label_column: str | None = option(None, "column with the classes, as numbers or names (default: label)")
    held_out: str | None = option(
        None,
        "held-out images for the loss and the metrics: split of the data set, or folder of class folders "
        "(default: training images)",
    )
    class_labels: str | None = option(
        None,
        "row of the class table to train for each class of the data, such as 207,360 (default: 0,1,2,...)",
    )
    new_class_table: bool = option(
        False,
        "train a new class table with one row per class of the data; always done if the base model has too "
        "few classes",
    )
    label_dropout: float = option(
        0.1, "fraction of samples trained without their class, for classifier-free guidance"
    )
    max_held_out_samples: int = option(2000, "evaluate on at most N held-out images, chosen at random")


def main() -> int:
    """Trains an adapter and returns the exit code."""
    options = parse(Options, description=__doc__.splitlines()[0])
    data = "train_data_dir" if options.train_data_dir else "dataset_name"
    options = complete_options(options, DEMO, data=data, command=FULL_COMMAND)
    examples, names = training_data(options)
    held_out = held_out_data(options, names)
    setup = prepare_run(options, adjust_options=partial(with_new_class_table, names=names))
    train_state = make_train_state(setup)  # first: a new class table is part of the adapter
    rows = class_table_rows(setup.model, names, options.class_labels)
    train_state.metadata["classes"] = json.dumps(names_by_row(names, rows))
    examples = with_rows_as_captions(examples, rows)
    held_out = with_rows_as_captions(held_out, rows)
    batches = make_batches(setup, examples, caption_dropout=options.label_dropout)
    report = ClassReport(setup, examples, held_out, rows=rows, names=names)
    training = Run(train_state, batches, report)
    for step in training.steps():
        training.log(step)
        training.validate(step)
        training.save(step)
    return training.exit_code


def training_data(options: Options) -> Data:
    """Reads the images of class folders, or of the data set's train split."""
    if options.dataset_name is None:
        return read_class_folders(resolve(options.train_data_dir), follow_links=options.follow_links)
    if options.train_data_dir is not None:
        raise ValueError("give --train_data_dir or --dataset_name, not both")
    return read_split(options, options.split)


def held_out_data(options: Options, names: Sequence[str]) -> list[Example]:
    """Reads the images of `--held_out`, with the numbers of the training data's classes; none without it."""
    if options.held_out is None:
        return []
    is_folder = options.dataset_name is None or Path(options.held_out).is_dir()
    if is_folder:
        examples, held_out_names = read_class_folders(options.held_out, follow_links=options.follow_links)
    else:
        examples, held_out_names = read_split(options, options.held_out)
    return match_by_name(examples, held_out_names, names)


def read_split(options: Options, split: str) -> Data:
    """Reads a split of the data set."""
    name = resolve(options.dataset_name)
    table = open_table(name, config_name=options.dataset_config_name, split=split)
    return read_labelled_table(
        table, name=name, image_column=options.image_column, label_column=options.label_column
    )


def with_rows_as_captions(examples: Sequence[Example], rows: Sequence[int]) -> list[Example]:
    """The examples with the rows of the class table in place of the data's class numbers.

    Raises:
        ValueError: for a label that is no class of the training data.
    """
    renumbered = []
    for example in examples:
        if not 0 <= example.caption < len(rows):
            raise ValueError(f"{example.source} has class {example.caption}; there are {len(rows)} classes")
        renumbered.append(dataclasses.replace(example, caption=rows[example.caption]))
    return renumbered


if __name__ == "__main__":
    sys.exit(run_command(main))
