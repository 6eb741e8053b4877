"""diffusers' DiTPipeline for class tables of any size.

The stock pipeline takes row 1000 for the null class and does not check labels. This one asks the table that
is in use, the base's or an adapter's. It has the same name, so that folders it saves say what they are.
"""

from collections.abc import Mapping, Sequence

import diffusers
import torch
from diffusers import ImagePipelineOutput

from diffadapt.adapters.class_table import ClassTable, table_in_use

STOCK_NULL = 1000  # what diffusers.DiTPipeline passes for the null class


class DiTPipeline(diffusers.DiTPipeline):
    """Draws images of classes 0, 1, ...; arguments as of ``diffusers.DiTPipeline``."""

    @property
    def class_table(self) -> ClassTable:
        """The rows in use; the null class is the last."""
        return table_in_use(self.transformer)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int],
        guidance_scale: float = 4.0,
        *arguments: object,
        **options: object,
    ) -> ImagePipelineOutput | tuple:
        """One image per label. Raises: ValueError, with the range, for a label that is no class."""
        labels = [class_labels] if isinstance(class_labels, int) else [int(label) for label in class_labels]
        table = self.class_table
        table.check(labels, "the base")

        def redirect(_: torch.nn.Module, positional: tuple, named: Mapping[str, object]) -> tuple:
            told = named["class_labels"].clone()
            told[len(labels) :] = table.null_class  # the second half, which is there when guided
            return positional, {**named, "class_labels": told}

        if table.null_class == STOCK_NULL:
            return super().__call__(labels, guidance_scale, *arguments, **options)
        handle = self.transformer.register_forward_pre_hook(redirect, with_kwargs=True)
        try:
            return super().__call__(labels, guidance_scale, *arguments, **options)
        finally:
            handle.remove()
