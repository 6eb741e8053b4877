"""The rows of a base's class table that the classes of a data set use, or a new table for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from diffadapt.common.messages import did_you_mean
from diffadapt.data.examples import Example
from diffadapt.methods import Method
from diffadapt.methods.class_embedding import ClassEmbedding
from diffadapt.methods.parse_method import with_class_table
from diffadapt.models.base import BaseModel
from diffadapt.models.class_conditioned import ClassConditionedBase
from diffadapt.training.adapter_options import build_method
from diffadapt.training.options import OptionsT

MAX_LISTED = 5  # rows in the summary


def find_new_table(method: Method) -> ClassEmbedding | None:
    """The member of a method that has a table for a new set of classes; None without one."""
    for member in method.members:
        if getattr(member, "classes", None) is not None:
            return member
    return None


def with_new_class_table(options: OptionsT, model: BaseModel, names: Sequence[str]) -> OptionsT:
    """Adds a new class table to the adapter, with `--new_class_table` or where the base has too few classes.

    An adapter that has one already, as `class_embedding(classes=20)`, stays.

    Args:
        options: with `class_labels` and `new_class_table`.
        names: of the data's classes.

    Raises:
        ValueError: the base is caption-conditioned, or the method cannot have a table beside it.
    """
    if not isinstance(model, ClassConditionedBase):
        raise ValueError(
            f"{model.source} is conditioned on captions, not classes; use train_scripts/style_transfer.py"
        )
    has_too_few = options.class_labels is None and len(names) > model.num_classes
    if find_new_table(build_method(options)) or not (options.new_class_table or has_too_few):
        return options
    has_null_class = model.null_class is not None
    adapter = with_class_table(options.adapter, len(names), null_class=has_null_class)
    return dataclasses.replace(options, adapter=adapter)


def class_table_rows(
    model: ClassConditionedBase, names: Sequence[str], class_labels: str | None
) -> list[int]:
    """The row of the class table in use for each class of the data.

    Args:
        names: of the data's classes.
        class_labels: `--class_labels`; None: 0, 1, 2, ...

    Raises:
        ValueError: the labels do not fit the data or the table.
    """
    labels = list(map(str, range(len(names))))
    if class_labels is not None:
        labels = class_labels.split(",")
    if len(labels) != len(names) or not all(label.strip().isdecimal() for label in labels):
        raise ValueError(
            f"--class_labels takes one number for each of the {len(names)} classes, as 0,1,2; "
            f"got {class_labels!r}"
        )
    rows = [int(label) for label in labels]
    table = model.class_table
    # Two classes in one row could not be told apart.
    has_repeats = len(set(rows)) < len(rows)
    if has_repeats or not set(table.labels).issuperset(rows):
        table_name = model.source if table.new_classes is None else "the adapter's new class table"
        size = max(len(rows), max(rows) + 1)
        raise ValueError(
            f"the data has {len(names)} classes, with the labels {','.join(labels)}: each must be another "
            f"class of {table_name}, which has {table}. For a class table of its own size: "
            f"--new_class_table, or --adapter '...+class_embedding(classes={size})'"
        )
    return rows


def match_by_name(
    examples: Sequence[Example], names: Sequence[str], training_names: Sequence[str]
) -> list[Example]:
    """Renumbers held-out examples as the training data numbers the classes of their names.

    Args:
        examples: with numbers into `names` as captions.
        names: of the held-out data's classes.
        training_names: of the training data's classes.

    Raises:
        ValueError: the training data does not have one of the classes.
    """
    training_numbers = {name: number for number, name in enumerate(training_names)}
    numbers = sorted({example.caption for example in examples})
    for number in numbers:
        if not 0 <= number < len(names):
            raise ValueError(f"held-out images have label {number}; their data has {len(names)} classes")
    for number in numbers:
        name = names[number]
        if name not in training_numbers:
            raise ValueError(
                f"--held_out has class {name!r}, which the training data does not have"
                f"{did_you_mean(name, training_numbers)}"
            )
    renumbered = []
    for example in examples:
        number = training_numbers[names[example.caption]]
        renumbered.append(dataclasses.replace(example, caption=number))
    return renumbered


def describe_class_table(model: ClassConditionedBase, rows: Sequence[int]) -> str:
    """A row of the summary: the class table in use, and the rows that the data's classes have in it."""
    table = model.class_table
    table_name = f"{model.source}'s table" if table.new_classes is None else "a new table of the adapter"
    return f"{len(rows)} of the data as {_shorten(rows)} of {table_name}: {table}"


def names_by_row(names: Sequence[str], rows: Sequence[int]) -> dict[int, str]:
    """The data's name of each class by its row, as adapter files keep it under `classes`."""
    return dict(sorted(zip(rows, names, strict=True)))


def _shorten(rows: Sequence[int]) -> str:
    listed = ",".join(map(str, rows[:MAX_LISTED]))
    return listed if len(rows) <= MAX_LISTED else f"{listed},...,{rows[-1]}"
