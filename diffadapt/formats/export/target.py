"""What an export target is: a kind of file for other programs, and how to fill, write and verify it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffadapt.adapters.adapter import Adapter
from diffadapt.formats.export.exported_layer import ExportedLayer
from diffadapt.formats.export.verify import Verdict


@dataclass(frozen=True)
class ExportJob:
    """One adapter on its way into a file.

    Attributes:
        adapter: the live adapter.
        layers: every layer that it changes, in the forms that the file holds once `ExportTarget.fit` has
            seen them.
        dtype: precision of the file.
        rank: of the SVD that replaces changes that are no thin products; None for no such cut.
        dense: whether to write whole differences where only ComfyUI reads the compact keys.
        force: whether to write a file that a program it is meant for reads wrong.
    """

    adapter: Adapter
    layers: Sequence[ExportedLayer]
    dtype: torch.dtype = torch.float32
    rank: int | None = None
    dense: bool = False
    force: bool = False


def no_entries(job: ExportJob) -> dict[str, str]:
    """The header of a target that adds nothing to the common one."""
    return {}


@dataclass(frozen=True)
class ExportTarget:
    """A kind of file that `export` writes.

    Attributes:
        name: as `--to` takes it.
        ending: of the name of what training writes beside an adapter: `.safetensors` last for one file, any
            other ending for a folder.
        meant_for: the programs that must give the adapter's weights, or the file is not written.
        fit: the layers in the forms that the file holds. Raises ValueError for what it cannot hold.
        write: writes the tensors to a path that does not exist yet, one file or a folder.
        verify: reads them back as the programs do and compares: one verdict for each program.
        header: entries of the header beyond the common ones.
        takes_rank: whether changes can be cut to a rank.
    """

    name: str
    ending: str
    meant_for: tuple[str, ...]
    fit: Callable[[ExportJob], Sequence[ExportedLayer]]
    write: Callable[[ExportJob, Path], None]
    verify: Callable[[ExportJob, Path], Sequence[Verdict]]
    header: Callable[[ExportJob], dict[str, str]] = no_entries
    takes_rank: bool = False

    @property
    def is_folder(self) -> bool:
        return not self.ending.endswith(".safetensors")


def save_tensors(tensors: Iterable[tuple[str, Tensor]], path: Path, dtype: torch.dtype) -> None:
    """Writes a safetensors file without a header.

    Args:
        tensors: keys and values; magnitudes stay float32, all others are rounded to `dtype`.

    Raises:
        ValueError: a value does not fit into the precision.
    """
    rounded: dict[str, Tensor] = {}  # one tensor in float64 at a time: `tensors` may be a generator
    for key, tensor in tensors:
        # rounding a magnitude would change the weight, not the change of it
        is_magnitude = "dora_scale" in key or "lora_magnitude_vector" in key
        value = tensor.to(torch.float32 if is_magnitude else dtype)
        rounded[key] = value.cpu().contiguous().clone()
        if not value.isfinite().all():
            raise ValueError(f"{key} does not fit into {dtype}; use dtype float32 or bfloat16")
    save_file(rounded, path)
