"""The class table of a model as it is used now: how many rows it has, and which of them are classes."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.utils.hooks import RemovableHandle

from diffadapt.algebra.class_table_rows import NewRows
from diffadapt.methods.site import is_class_table

SIZES = ("num_class_embeds", "num_embeds_ada_norm")  # a configuration's number of rows or classes


@dataclass(frozen=True)
class ClassTable:
    """Rows of a class table in use, the base's or an adapter's.

    Attributes:
        rows: how many there are.
        null_class: the row that means "no class"; None where there is none.
        new_classes: classes of an adapter's own set, numbered from 0; None: the base's classes.
    """

    rows: int
    null_class: int | None
    new_classes: int | None = None

    @property
    def labels(self) -> Sequence[int]:
        """The classes that can be asked for."""
        if self.new_classes is not None:
            return range(self.new_classes)
        return [row for row in range(self.rows) if row != self.null_class]

    def __str__(self) -> str:
        labels = self.labels
        span = f", {labels[0]} to {labels[-1]}" if len(labels) else ""
        null = "" if self.null_class is None else f", and the null class {self.null_class}"
        return f"{len(labels)} class{'es' * (len(labels) != 1)}{span}{null}"

    def check(self, labels: Iterable[object], owner: str) -> None:
        """Raises ValueError, with the range, for a label that is no class."""
        known = set(self.labels)
        for label in labels:
            if isinstance(label, bool) or not isinstance(label, int) or label not in known:
                which = "the adapter's new class table" if self.new_classes is not None else owner
                raise ValueError(f"no class {label!r}: {which} has {self}")


def class_tables(model: nn.Module) -> dict[str, nn.Embedding]:
    """The class table by module name; a DiT holds a copy in every block."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Embedding) and is_class_table(name)
    }


def table_in_use(model: nn.Module, *, null_from_end: int | None = 1) -> ClassTable:
    """The class table that a forward of the model uses now, with what adapters make of it.

    Args:
        null_from_end: where the null class is, counted from the end: 1 for the last row; None: there is none.

    Raises: ValueError for a model without a class table.
    """
    layer = next(iter(class_tables(model).values()), None)
    if layer is None:
        raise ValueError(f"{type(model).__name__} has no class table, so it takes no classes")
    rows, new_classes = _rows_of(layer)
    return ClassTable(rows, None if null_from_end is None else rows - null_from_end, new_classes)


def _rows_of(layer: nn.Embedding) -> tuple[int, int | None]:
    """Rows in use, and classes of the largest new set; None without one."""
    layer_state = getattr(layer, "_diffadapt", None)
    updates = [] if layer_state is None else layer_state.updates(layer_state.entries)
    tables = [u.delta for strength, u in updates if strength != 0 and isinstance(u.delta, NewRows)]
    rows = max([_base_rows(layer), *(table.rows for table in tables)])
    return rows, max((table.classes for table in tables), default=None)


def check_new_table(
    method: object, layers: Collection[nn.Module], model: nn.Module, pipe: object | None
) -> None:
    """Whether a method's new class table fits a model, and the pipeline it may be part of.

    Args:
        layers: those that the method changes.
    Raises: ValueError when copies of the table are left out, or the base's null class is elsewhere than the
        method says. Warns where a stock pipeline would take a class for the null class.
    """
    if getattr(method, "classes", None) is None:
        return
    tables = class_tables(model)
    left = [name for name, layer in tables.items() if not any(layer is other for other in layers)]
    if not tables or len(left) == len(tables):
        return
    if left:
        raise ValueError(f"{method} must change every copy of the class table; {left[0]} is left out")
    name, layer = next(iter(tables.items()))
    place = _null_from_end(_label_embedder(model, name), layer, pipe)
    if place is not None and place > 1:
        raise ValueError(f"{method}: a new class table needs the base's null class in its last row")
    if place is not None and bool(place) != method.null_class:
        known = "has a null class: drop null_class=False" if place else "has no null class: null_class=False"
        raise ValueError(f"{method}: the base {known}")
    stock = type(pipe).__name__ == "DiTPipeline" and type(pipe).__module__.startswith("diffusers.")
    if stock and method.classes >= _base_rows(layer):
        warnings.warn(
            f"{method}: stock DiTPipeline takes row 1000 for the null class, which is {method.classes} now; "
            "draw with diffadapt.pipelines.DiTPipeline or `diffadapt sample`, or with guidance_scale=1",
            stacklevel=4,
        )


def _label_embedder(model: nn.Module, table: str) -> nn.Module | None:
    """The LabelEmbedding of diffusers, or of DiT's own code, that holds a table; None where none does."""
    parent = model.get_submodule(table.rpartition(".")[0])
    return parent if hasattr(parent, "token_drop") else None


def _null_from_end(embedder: nn.Module | None, layer: nn.Embedding, pipe: object | None) -> int | None:
    """1 for a null class in the last row, 2 for the one before; 0 without one; None where nothing says so."""
    if embedder is not None:
        return layer.num_embeddings - embedder.num_classes
    table = getattr(pipe, "class_table", None)
    if table is None:
        return None
    return 0 if table.null_class is None else table.rows - table.null_class


def _base_rows(layer: nn.Embedding) -> int:
    layer_state = getattr(layer, "_diffadapt", None)
    return len(layer.weight if layer_state is None else layer_state.base())


def follow_rows(models: Iterable[nn.Module]) -> None:
    """After rows were merged or taken out: bring sizes that modules and configurations name up to date."""
    for model in models:
        gained = 0
        for name, layer in class_tables(model).items():
            gained = len(layer.weight) - layer.num_embeddings
            layer.num_embeddings += gained
            if embedder := _label_embedder(model, name):
                embedder.num_classes += gained
        for key in SIZES if gained and hasattr(model, "register_to_config") else ():
            if model.config.get(key) is not None:
                model.register_to_config(**{key: model.config[key] + gained})


def follow_dropout(model: nn.Module) -> list[RemovableHandle]:
    """Make LabelEmbedding's dropout of labels in training mode drop to the null class in use."""
    handles = []
    for embedder in (_label_embedder(model, name) for name in class_tables(model)):
        if embedder is not None:
            handles.append(embedder.register_forward_pre_hook(_null_in_use))
            handles.append(embedder.register_forward_hook(_null_of_base, always_call=True))
    return handles


def _null_in_use(embedder: nn.Module, _: object) -> None:
    if embedder.training:
        embedder.num_classes = _rows_of(embedder.embedding_table)[0] - 1


def _null_of_base(embedder: nn.Module, *_: object) -> None:
    if embedder.training:
        embedder.num_classes = embedder.embedding_table.num_embeddings - 1
