"""Adapters in the files of other programs, proven against each program's arithmetic when they are written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
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
    carried,
    metadata_of,
    network_of,
)
from diffadapt.formats.export.report import ExportReport
from diffadapt.formats.export.verify import Verdict, verify_diffusers, verify_kohya

MEANT_FOR = {"kohya": ("ComfyUI",), "diffusers": ("diffusers",), "merged": ("diffusers",)}

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
    """Write an adapter for other programs, read the file back as they do, and compare.

    Args:
        to: ``kohya`` (ComfyUI, A1111, LyCORIS), ``diffusers`` (``load_lora_weights``) or ``merged`` (a whole
            pipeline, or the model alone that was attached to).
        rank: for diffusers, the rank of the SVD that replaces changes that are no thin products.
        dtype: precision of the file: float32, float16 or bfloat16.
        dense: for kohya, whole differences instead of keys that ComfyUI alone reads right.
        force: write a file that a program it is meant for refuses or reads wrong.
        base: name of the base, recorded in the file.
        metadata: further text to keep in the header, e.g. a training summary.

    Returns: who reads the file and how exactly.
    Raises: ValueError saying why the adapter cannot be held, or which program would not give its weights; no
        file is written then.
    """
    path = Path(path)
    check_arguments(to, dtype, rank)
    changes = checked_layers(adapter, to, force)
    title = path.stem if path.suffix == ".safetensors" else path.name
    header = metadata_of(adapter, base_architecture(adapter), title=title, base_name=base, extra=metadata)
    if to == "merged":
        return _write_folder(adapter, path, changes, DTYPES[dtype], header, force)
    if to == "diffusers":
        check_loader(adapter)
        changes = low_rank_layers(changes, rank)
        named, header["lora_adapter_metadata"] = diffusers_tensors(changes), adapter_config(changes)
    else:
        named = kohya_tensors(changes, base_architecture(adapter), dense=dense)
    return _write_file(adapter, path, to, changes, named, DTYPES[dtype], header, force)


# what training can leave beside the adapter, and the end of its name
DEFAULT_FORMAT = "kohya"  # where nothing is said
FORMATS = {"kohya": "_comfyui.safetensors", "diffusers": "_diffusers.safetensors", "merged": "_merged"}


def write_formats(adapter: Adapter, file: str | Path, formats: str | None) -> list[str]:
    """Write the formats (comma-separated: kohya, diffusers, merged; or none) beside an adapter's own file.

    What cannot be written is said instead of failing: the adapter itself is already safe.
    Returns: one line for each format.
    """
    lines, file = [], Path(file)
    header = read_metadata(file)
    told = {"base": header["adapter"]["base"]["name"], "metadata": carried(header)}
    for chosen in parse_formats(formats):
        path = file.with_name(f"{file.stem}{FORMATS[chosen]}")
        try:
            lines.append(export(adapter, path, chosen, **told).line)
        except ValueError as error:
            lines.append(f"no {path.name}: {error}")
    return lines


def parse_formats(formats: str | None) -> list[str]:
    """Names of formats from ``kohya,diffusers``; None: the default. Raises ValueError for an unknown one."""
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
    changes: list[ExportedLayer],
    named: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    header: dict[str, str],
    force: bool,
) -> ExportReport:
    tensors = _rounded(named, dtype)
    header |= network_of(tensors, adapter)
    whole = any(key.endswith(".diff") for key in tensors)
    if whole:
        header["diffadapt.base_only"] = base_only_note(adapter)
    reports: list[ExportReport] = []

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, {k: v for k, v in header.items() if k.startswith("ss_")})
        if to == "kohya":
            verdicts = verify_kohya(str(temporary), changes, base_architecture(adapter), dtype)
        else:
            verdicts = verify_diffusers(str(temporary), changes, dtype)
        error, layers = _rank_error(changes), len(changes)
        report = ExportReport(path, to, layers, tuple(verdicts), MEANT_FOR[to], whole, rank_error=error)
        refuse_unless_good(report, force)
        header.update(additional_hashes(Path(temporary)))
        header["diffadapt.accepted_by"] = ", ".join(report.accepted_by)
        save_file(tensors, temporary, header)
        reports.append(report)

    write_atomically(path, write)
    return reports[0]


def _write_folder(
    adapter: Adapter,
    folder: Path,
    changes: list[ExportedLayer],
    dtype: torch.dtype,
    header: dict[str, str],
    force: bool,
) -> ExportReport:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not force:
        raise ValueError(f"{folder} already exists; choose another name, or replace it with --force")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_merged(adapter, temporary, changes, dtype, header)
        verdict = verify_merged(temporary, changes, dtype)
        lost = lost_in_rounding(changes, dtype)
        report = ExportReport(
            folder,
            "merged",
            len(changes),
            (verdict,),
            MEANT_FOR["merged"],
            lost_in_rounding=lost,
            note=note_on_guidance(adapter, changes),
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
        wide = "dora_scale" in key or "lora_magnitude_vector" in key
        value = tensor.to(torch.float32 if wide else dtype)
        rounded[key] = value.cpu().contiguous().clone()
        if not value.isfinite().all():
            raise ValueError(f"{key} does not fit into {dtype}; use dtype float32 or bfloat16")
    return rounded


def _rank_error(changes: list[ExportedLayer]) -> float:
    """Share of the whole change that cutting to a rank leaves out."""
    if not any(change.is_approximated for change in changes):
        return 0.0
    left_out = whole = 0.0
    for change in changes:
        adapted = change.adapted
        if change.is_approximated:
            left_out += (adapted - change.expected_weight()).square().sum().item()
        whole += (adapted - change.weight).square().sum().item()
    return (left_out / whole) ** 0.5 if whole else 0.0
