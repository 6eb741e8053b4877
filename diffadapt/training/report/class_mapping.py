"""The classes of a data set and those of a base: one table for both, or a new one."""

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


def new_table(method: Method) -> ClassEmbedding | None:
    """The part of a method that has a table for a new set of classes."""
    return next((part for part in method.members if getattr(part, "classes", None) is not None), None)


def with_new_table(options: OptionsT, model: BaseModel, names: Sequence[str]) -> OptionsT:
    """Options whose adapter has a class table for the data, with `--new_class_table` or where the base has
    too few classes; an adapter that has one already, as ``class_embedding(classes=20)``, stays.

    Args:
        options: with `class_labels` and `new_class_table`.
        names: of the data's classes.

    Raises: ValueError for a base that is told words, or a method that cannot have a table beside it.
    """
    if not isinstance(model, ClassConditionedBase):
        raise ValueError(
            f"{model.source} is conditioned on captions, not classes; use train_scripts/style_transfer.py"
        )
    too_many = options.class_labels is None and len(names) > model.num_classes
    if new_table(build_method(options)) or not (options.new_class_table or too_many):
        return options
    has_null = model.null_class is not None
    return dataclasses.replace(
        options, adapter=with_class_table(options.adapter, len(names), null_class=has_null)
    )


def labels_of(model: ClassConditionedBase, names: Sequence[str], class_labels: str | None) -> list[int]:
    """The row of the class table in use for each class of the data.

    Raises: ValueError when the labels do not fit the data or the table.
    """
    given = class_labels.split(",") if class_labels is not None else list(map(str, range(len(names))))
    if not all(label.strip().isdecimal() for label in given) or len(given) != len(names):
        raise ValueError(
            f"--class_labels takes one number for each of the {len(names)} classes, as 0,1,2; "
            f"got {class_labels!r}"
        )
    rows, table = [int(label) for label in given], model.class_table
    if len(set(rows)) < len(rows) or not set(table.labels).issuperset(rows):
        which = model.source if table.new_classes is None else "the adapter's new class table"
        raise ValueError(
            f"the data has {len(names)} classes, told as {','.join(given)}: each must be another class of "
            f"{which}, which has {table}. For a class table of its own size: --new_class_table, or "
            f"--adapter '...+class_embedding(classes={max(len(rows), max(rows) + 1)})'"
        )
    return rows


def matched_by_name(
    examples: Sequence[Example], names: Sequence[str], training_names: Sequence[str]
) -> list[Example]:
    """Held-out examples with the numbers that the training data gives to the classes of their names.

    Args:
        examples: with numbers into `names` as captions.
        names: of the held-out data's classes.
        training_names: of the training data's classes.

    Raises: ValueError for a class that the training data does not have.
    """
    number_of = {name: number for number, name in enumerate(training_names)}
    used = sorted({example.caption for example in examples})
    outside = [number for number in used if not 0 <= number < len(names)]
    if outside:
        raise ValueError(f"held-out images have label {outside[0]}; their data has {len(names)} classes")
    for number in used:
        if names[number] not in number_of:
            raise ValueError(
                f"--held_out has class {names[number]!r}, which the training data does not have"
                f"{did_you_mean(names[number], number_of)}"
            )
    return [dataclasses.replace(example, caption=number_of[names[example.caption]]) for example in examples]


def table_note(model: ClassConditionedBase, rows: Sequence[int]) -> str:
    """For the summary: which class table is used, and the rows the data's classes have in it."""
    table = model.class_table
    which = f"{model.source}'s table" if table.new_classes is None else "a new table of the adapter"
    return f"{len(rows)} of the data as {_listed(rows)} of {which}: {table}"


def class_names(names: Sequence[str], rows: Sequence[int]) -> dict[int, str]:
    """The data's name of each class by its row, as adapter files keep it under ``classes``."""
    return dict(sorted(zip(rows, names, strict=True)))


def _listed(rows: Sequence[int]) -> str:
    shown = ",".join(map(str, rows[:5]))
    return shown if len(rows) <= 5 else f"{shown},...,{rows[-1]}"
