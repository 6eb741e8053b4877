"""The class table of a model as it is used now: how many rows it has, and which of them are classes.

Whatever an adapter's new class table needs of a model, beyond the change of its weight, is here: the check
before it is attached, sizes in configurations, and the dropout of labels.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.utils.hooks import RemovableHandle

from diffadapt.adapters.layers import layer_state_of
from diffadapt.algebra.class_table_expression import NewClassTable, new_class_tables
from diffadapt.methods.site import is_class_table

SIZE_KEYS = ("num_class_embeds", "num_embeds_ada_norm")  # a configuration's number of rows or classes


@dataclass(frozen=True)
class ClassTable:
    """Rows of a class table in use, the base's or an adapter's.

    Attributes:
        rows: the number of rows.
        null_class: the row that means "no class"; None where there is none.
        new_classes: classes of an adapter's own set, numbered from 0; None for the base's classes.
    """

    rows: int
    null_class: int | None
    new_classes: int | None = None

    @property
    def labels(self) -> Sequence[int]:
        """The classes that can be generated."""
        if self.new_classes is not None:
            return range(self.new_classes)
        return [row for row in range(self.rows) if row != self.null_class]

    def __str__(self) -> str:
        labels = self.labels
        text = f"{len(labels)} class" if len(labels) == 1 else f"{len(labels)} classes"
        if labels:
            text += f", {labels[0]} to {labels[-1]}"
        if self.null_class is not None:
            text += f", and the null class {self.null_class}"
        return text

    def check(self, labels: Iterable[object], owner: str) -> None:
        """Checks that labels are classes.

        Args:
            labels: the labels.
            owner: whose classes they are, where they are not an adapter's, e.g. `the base`.

        Raises:
            ValueError: a label is no class; the message names the first one and the range.
        """
        known_labels = set(self.labels)
        for label in labels:
            if isinstance(label, bool) or not isinstance(label, int) or label not in known_labels:
                which = owner if self.new_classes is None else "the adapter's new class table"
                raise ValueError(f"no class {label!r}: {which} has {self}")


def class_tables(model: nn.Module) -> dict[str, nn.Embedding]:
    """The class tables by module name; a DiT holds a copy in every block."""
    tables = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Embedding) and is_class_table(name):
            tables[name] = layer
    return tables


def table_in_use(model: nn.Module, *, null_from_end: int | None = 1) -> ClassTable:
    """The class table that a forward of the model uses now, with the changes of adapters.

    Args:
        model: the denoiser.
        null_from_end: the row of the null class, counted from the end: 1 for the last row; None for no such
            row.

    Raises:
        ValueError: the model has no class table.
    """
    layer = next(iter(class_tables(model).values()), None)  # the first stands for all copies
    if layer is None:
        raise ValueError(f"{type(model).__name__} has no class table, so it takes no classes")
    rows = _rows_in_use(layer)
    null_class = None if null_from_end is None else rows - null_from_end
    # of several adapters the largest table decides: changes add up, smaller ones padded to its rows
    new_classes = max((table.num_classes for table in _new_tables(layer)), default=None)
    return ClassTable(rows, null_class, new_classes)


def check_new_table(
    method: object, layers: Collection[nn.Module], model: nn.Module, pipe: object | None
) -> None:
    """Checks that a method's new class table fits a model, and the pipeline it may be part of.

    Warns where a stock pipeline would take a class for the null class.

    Args:
        method: any method; only those with `classes` have a new class table.
        layers: the layers that the method changes.
        model: the model.
        pipe: its pipeline; None for a bare model.

    Raises:
        ValueError: copies of the table are left out, or the base's null class is elsewhere than the
            method says.
    """
    if getattr(method, "classes", None) is None:
        return
    tables = class_tables(model)
    changed_ids = set(map(id, layers))
    unchanged = [name for name, layer in tables.items() if id(layer) not in changed_ids]
    if not tables or len(unchanged) == len(tables):  # the method's table is that of another component
        return
    if unchanged:
        raise ValueError(f"{method} must change every copy of the class table; {unchanged[0]} is left out")
    name, layer = next(iter(tables.items()))
    null_from_end = _null_from_end(_label_embedder(model, name), layer, pipe)
    if null_from_end is not None and null_from_end > 1:
        raise ValueError(f"{method}: a new class table needs the base's null class in its last row")
    if null_from_end == 0 and method.null_class:
        raise ValueError(f"{method}: the base has no null class: null_class=False")
    if null_from_end == 1 and not method.null_class:
        raise ValueError(f"{method}: the base has a null class: drop null_class=False")
    is_stock = type(pipe).__name__ == "DiTPipeline" and type(pipe).__module__.startswith("diffusers.")
    if is_stock and method.classes >= _base_rows(layer):
        warnings.warn(
            f"{method}: stock DiTPipeline takes row 1000 for the null class, which is {method.classes} now; "
            "draw with diffadapt.pipelines.DiTPipeline or `diffadapt sample`, or with guidance_scale=1",
            stacklevel=5,
        )


def sync_table_sizes(models: Iterable[nn.Module]) -> None:
    """After rows were merged or taken out: brings sizes in modules and configurations up to date."""
    for model in models:
        new_rows = 0  # the same for all tables of a model, which are copies of one
        for name, layer in class_tables(model).items():
            new_rows = len(layer.weight) - layer.num_embeddings
            layer.num_embeddings += new_rows
            embedder = _label_embedder(model, name)
            if embedder is not None:
                embedder.num_classes += new_rows
        if new_rows == 0 or not hasattr(model, "register_to_config"):
            continue
        for key in SIZE_KEYS:
            if model.config.get(key) is not None:
                model.register_to_config(**{key: model.config[key] + new_rows})


def label_dropout_hooks(method: object, model: nn.Module) -> list[RemovableHandle]:
    """Makes the dropout of labels in training mode drop to the null class of a method's new class table.

    Args:
        method: any method; those without `classes` need no hooks.
        model: the model.

    Returns:
        The handles that remove the hooks.
    """
    if getattr(method, "classes", None) is None:
        return []
    # LabelEmbedding reads its null class from `num_classes`, so that is another one during its forward.
    handles = []
    for name in class_tables(model):
        embedder = _label_embedder(model, name)
        if embedder is not None:
            handles.append(embedder.register_forward_pre_hook(_use_null_class_in_use))
            handles.append(embedder.register_forward_hook(_use_null_class_of_base, always_call=True))
    return handles


def _new_tables(layer: nn.Embedding) -> list[NewClassTable]:
    """The new class tables of adapters that act on a layer."""
    layer_state = layer_state_of([layer])
    return new_class_tables(layer_state.updates(layer_state.entries))


def _rows_in_use(layer: nn.Embedding) -> int:
    rows = _base_rows(layer)
    for table in _new_tables(layer):
        rows = max(rows, table.num_rows)
    return rows


def _base_rows(layer: nn.Embedding) -> int:
    return len(layer_state_of([layer]).base())


def _label_embedder(model: nn.Module, table: str) -> nn.Module | None:
    """The LabelEmbedding of diffusers, or of DiT's own code, that holds a table; None where none does."""
    parent = model.get_submodule(table.rpartition(".")[0])
    return parent if hasattr(parent, "token_drop") else None


def _null_from_end(embedder: nn.Module | None, layer: nn.Embedding, pipe: object | None) -> int | None:
    """1 for a null class in the last row, 2 for the one before; 0 without one; None where nothing says so."""
    if embedder is not None:  # LabelEmbedding adds a row for the null class where it drops labels at all
        return layer.num_embeddings - embedder.num_classes
    table = getattr(pipe, "class_table", None)
    if table is None:
        return None
    return 0 if table.null_class is None else table.rows - table.null_class


def _use_null_class_in_use(embedder: nn.Module, _: object) -> None:
    if embedder.training:
        embedder.num_classes = _rows_in_use(embedder.embedding_table) - 1


def _use_null_class_of_base(embedder: nn.Module, *_: object) -> None:
    if embedder.training:
        embedder.num_classes = embedder.embedding_table.num_embeddings - 1
