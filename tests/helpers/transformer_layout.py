"""Parameters of a transformer in the layout of its original code, which ComfyUI's models have."""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffadapt.adapters.architectures import PublishedNames


def original_checkpoint(
    parameters: Mapping[str, Tensor], names: PublishedNames, *, norm_weight: str = "weight"
) -> dict[str, Tensor]:
    """Parameters by diffusers' keys as parameters by those of the original code.

    Args:
        norm_weight: what the original code calls the weight of a norm.
    """
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for key, value in parameters.items():
        path, _, kind = key.rpartition(".")
        layer = names.original_layer(path)
        if layer.swaps_halves:
            value = torch.cat(value.chunk(2)[::-1])
        if kind == "weight" and layer.path.endswith("_norm"):
            kind = norm_weight
        parts.setdefault(f"{layer.path}.{kind}", []).append((layer.first_row, value))
    checkpoint = {}
    for key, rows in parts.items():
        rows.sort(key=lambda part: part[0])
        starts = [start for start, _ in rows]
        heights = [len(value) for _, value in rows]
        assert starts == [sum(heights[:index]) for index in range(len(rows))], key
        checkpoint[key] = torch.cat([value for _, value in rows])
    return checkpoint
