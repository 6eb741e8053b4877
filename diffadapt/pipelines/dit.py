"""diffusers' DiTPipeline for class tables of any size.

The stock pipeline takes row 1000 for the null class and does not check labels. This one reads the table in
use, the base's or an adapter's. It has the same name, so that folders it saves open with stock diffusers.
"""

from collections.abc import Mapping, Sequence

import diffusers
import torch
from diffusers import ImagePipelineOutput

from diffadapt.adapters.class_table import ClassTable, table_in_use

STOCK_NULL_CLASS = 1000  # that diffusers.DiTPipeline passes


class DiTPipeline(diffusers.DiTPipeline):
    """Generates images of classes 0, 1, ...; arguments as of `diffusers.DiTPipeline`."""

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
        """One image per label.

        Raises:
            ValueError: a label is no class; the message has the range.
        """
        labels = [class_labels] if isinstance(class_labels, int) else [int(label) for label in class_labels]
        table = self.class_table
        table.check(labels, "the base")

        def replace_null_class(_: torch.nn.Module, args: tuple, kwargs: Mapping[str, object]) -> tuple:
            row_indices = kwargs["class_labels"].clone()
            row_indices[len(labels) :] = table.null_class  # the unconditional half, where there is guidance
            return args, {**kwargs, "class_labels": row_indices}

        if table.null_class == STOCK_NULL_CLASS:
            return super().__call__(labels, guidance_scale, *arguments, **options)
        # the stock call makes the null labels itself, so they are replaced on their way into the transformer
        handle = self.transformer.register_forward_pre_hook(replace_null_class, with_kwargs=True)
        try:
            return super().__call__(labels, guidance_scale, *arguments, **options)
        finally:
            handle.remove()
