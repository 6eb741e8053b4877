"""Adapters in the files of other programs, proven against each program's arithmetic when they are written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffadapt.adapters.adapter import Adapter
from diffadapt.common.atomic_files import write_atomically
from diffadapt.common.messages import did_you_mean
from diffadapt.formats.adapter_file import read_metadata
from diffadapt.formats.export.checks import (
    DTYPES,
    KINDS,
    check_arguments,
    checked_layers,
    refuse_unless_good,
)
from diffadapt.formats.export.diffusers import (
    adapter_config,
    check_loader,
    diffusers_tensors,
    low_rank_layers,
)
from diffadapt.formats.export.exported_layer import ExportedLayer
from diffadapt.formats.export.kohya import kohya_tensors
from diffadapt.formats.export.layer_names import base_architecture
from diffadapt.formats.export.merged import (
    lost_in_rounding,
    note_on_guidance,
    replace_folder,
    verify_merged,
    write_merged,
)
from diffadapt.formats.export.metadata import (
    additional_hashes,
    base_only_note,
    metadata_of,
    network_of,
    training_metadata,
)
from diffadapt.formats.export.report import ExportReport
from diffadapt.formats.export.verify import Verdict, verify_diffusers, verify_kohya

# the programs that a file must be right in to be written
MEANT_FOR = {"kohya": ("ComfyUI",), "diffusers": ("diffusers",), "merged": ("diffusers",)}
# formats that training writes beside the adapter -> the end of the file's name
FORMATS = {"kohya": "_comfyui.safetensors", "diffusers": "_diffusers.safetensors", "merged": "_merged"}
DEFAULT_FORMAT = "kohya"

__all__ = ["DTYPES", "KINDS", "ExportReport", "Verdict", "export", "parse_formats", "write_formats"]


def export(
    adapter: Adapter,
    path: str | Path,
    to: str = "kohya",
    *,
    rank: int | None = None,
    dtype: str = "float32",
    dense: bool = False,
    force: bool = False,
    base: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ExportReport:
    """Writes an adapter for other programs, reads the file back as they do, and compares.

    Args:
        to: `kohya` (ComfyUI, A1111, LyCORIS), `diffusers` (`load_lora_weights`) or `merged` (a whole
            pipeline, or the model alone that was attached to).
        rank: for diffusers, the rank of the SVD that replaces changes that are no thin products.
        dtype: precision of the file: float32, float16 or bfloat16.
        dense: for kohya, whole differences instead of keys that ComfyUI alone reads right.
        force: write a file even if a program it is meant for refuses it or reads it wrong.
        base: name of the base, recorded in the file.
        metadata: further text to keep in the header, e.g. a training summary.

    Returns:
        The programs that read the file, and how exactly.

    Raises:
        ValueError: the format cannot hold the adapter, or a program would not give its weights; no file is
            written then.
    """
    path = Path(path)
    check_arguments(to, dtype, rank)
    layers = checked_layers(adapter, to, force)
    architecture = base_architecture(adapter)
    title = path.stem if path.suffix == ".safetensors" else path.name
    header = metadata_of(adapter, architecture, title=title, base_name=base, extra=metadata)
    if to == "merged":
        return _write_folder(adapter, path, layers, DTYPES[dtype], header, force)
    if to == "diffusers":
        check_loader(adapter)
        layers = low_rank_layers(layers, rank)
        header["lora_adapter_metadata"] = adapter_config(layers)
        tensors = diffusers_tensors(layers)
    else:
        tensors = kohya_tensors(layers, architecture, dense=dense)
    return _write_file(adapter, path, to, layers, tensors, DTYPES[dtype], header, force)


def write_formats(adapter: Adapter, file: str | Path, formats: str | None) -> list[str]:
    """Writes formats beside an adapter's own file.

    A format that cannot be written is no error: the adapter itself is already safe.

    Args:
        file: the adapter's own file.
        formats: comma-separated, as `parse_formats` takes them.

    Returns:
        One line for each format: its file, or why there is none.
    """
    file = Path(file)
    header = read_metadata(file)
    base = header["adapter"]["base"]["name"]
    metadata = training_metadata(header)
    lines = []
    for name in parse_formats(formats):
        path = file.with_name(f"{file.stem}{FORMATS[name]}")
        try:
            report = export(adapter, path, name, base=base, metadata=metadata)
            lines.append(report.line)
        except ValueError as error:
            lines.append(f"no {path.name}: {error}")
    return lines


def parse_formats(formats: str | None) -> list[str]:
    """Names of formats from `kohya,diffusers`; none for `none`, the default one for None.

    Raises:
        ValueError: a format is unknown, or `none` stands beside others.
    """
    if formats is None:
        return [DEFAULT_FORMAT]
    names = [name.strip() for name in formats.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--export_formats {formats!r} names no format; give {', '.join(FORMATS)} or none")
    if names == ["none"]:
        return []
    if "none" in names:
        raise ValueError(
            f"--export_formats {formats}: none excludes other formats; leave it out, or the others"
        )
    for name in names:
        if name not in FORMATS:
            raise ValueError(
                f"--export_formats: unknown format {name!r}{did_you_mean(name, [*FORMATS, 'none'])}"
            )
    return names


def _write_file(
    adapter: Adapter,
    path: Path,
    to: str,
    layers: Sequence[ExportedLayer],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    header: dict[str, str],
    force: bool,
) -> ExportReport:
    rounded = _rounded(tensors, dtype)
    header |= network_of(rounded, adapter)
    holds_differences = any(key.endswith(".diff") for key in rounded)
    if holds_differences:
        header["diffadapt.base_only"] = base_only_note(adapter)
    reports: list[ExportReport] = []

    def write(temporary: Path) -> None:
        # kohya's hashes are of a file with these keys alone
        save_file(rounded, temporary, {key: text for key, text in header.items() if key.startswith("ss_")})
        if to == "kohya":
            verdicts = verify_kohya(str(temporary), layers, base_architecture(adapter), dtype)
        else:
            verdicts = verify_diffusers(str(temporary), layers, dtype)
        report = ExportReport(
            path,
            to,
            len(layers),
            tuple(verdicts),
            MEANT_FOR[to],
            base_only=holds_differences,
            rank_error=_rank_error(layers),
        )
        refuse_unless_good(report, force)
        header.update(additional_hashes(Path(temporary)))
        header["diffadapt.accepted_by"] = ", ".join(report.accepted_by)
        save_file(rounded, temporary, header)
        reports.append(report)

    write_atomically(path, write)
    return reports[0]


def _write_folder(
    adapter: Adapter,
    folder: Path,
    layers: Sequence[ExportedLayer],
    dtype: torch.dtype,
    header: dict[str, str],
    force: bool,
) -> ExportReport:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not force:
        raise ValueError(f"{folder} already exists; choose another name, or replace it with --force")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_merged(adapter, temporary, layers, dtype, header)
        report = ExportReport(
            folder,
            "merged",
            len(layers),
            (verify_merged(temporary, layers, dtype),),
            MEANT_FOR["merged"],
            lost_in_rounding=lost_in_rounding(layers, dtype),
            note=note_on_guidance(adapter, layers),
        )
        refuse_unless_good(report, force)
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _rounded(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors in the file's precision, on the CPU. Raises ValueError where they do not fit into it."""
    rounded: dict[str, Tensor] = {}
    for key, tensor in tensors:
        # rounding a magnitude would change the weight, not the change of it
        is_magnitude = "dora_scale" in key or "lora_magnitude_vector" in key
        value = tensor.to(torch.float32 if is_magnitude else dtype)
        rounded[key] = value.cpu().contiguous().clone()
        if not value.isfinite().all():
            raise ValueError(f"{key} does not fit into {dtype}; use dtype float32 or bfloat16")
    return rounded


def _rank_error(layers: Sequence[ExportedLayer]) -> float:
    """The part of the change that cutting to a rank leaves out, relative to the whole, in Frobenius norms."""
    if not any(layer.is_approximated for layer in layers):
        return 0.0
    squared_error = squared_change = 0.0
    for layer in layers:
        adapted = layer.adapted
        if layer.is_approximated:
            squared_error += (adapted - layer.expected_weight()).square().sum().item()
        squared_change += (adapted - layer.weight).square().sum().item()
    return (squared_error / squared_change) ** 0.5 if squared_change else 0.0
