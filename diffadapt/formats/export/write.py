"""Exports written under a temporary name, verified, described in their header, and put in their place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from diffadapt.common.atomic_files import write_atomically
from diffadapt.formats.export.checks import refuse_unless_good
from diffadapt.formats.export.class_rows import note_on_guidance
from diffadapt.formats.export.exported_layer import ExportedLayer
from diffadapt.formats.export.metadata import (
    additional_hashes,
    base_only_note,
    network_of,
    quantised_base_note,
)
from diffadapt.formats.export.report import ExportReport
from diffadapt.formats.export.target import ExportJob, ExportTarget


def write_file(target: ExportTarget, job: ExportJob, path: Path, header: dict[str, str]) -> ExportReport:
    """Writes one safetensors file.

    Raises:
        ValueError: a program that the file is meant for does not read it right; there is no file then.
    """
    reports: list[ExportReport] = []

    def write(temporary: Path) -> None:
        target.write(job, temporary)
        verdicts = target.verify(job, temporary)
        # the header says what verification found, so it is written last, around the same tensors
        tensors = load_file(temporary)
        note = quantised_base_note(job.layers)
        holds_differences = any(key.endswith(".diff") for key in tensors)
        report = ExportReport(
            path,
            target.name,
            len(job.layers),
            tuple(verdicts),
            target.meant_for,
            base_only=holds_differences,
            rank_error=_rank_error(job.layers),
            note=note,
        )
        refuse_unless_good(report, job.force)
        entries = header | target.header(job) | network_of(tensors, job.adapter)
        if holds_differences:
            entries["diffadapt.base_only"] = base_only_note(job.adapter)
        if note:
            entries["diffadapt.quantised_base"] = note
        entries["diffadapt.accepted_by"] = ", ".join(report.accepted_by)
        # kohya's hashes are of a file with these keys alone
        training_entries = {key: text for key, text in entries.items() if key.startswith("ss_")}
        save_file(tensors, temporary, training_entries)
        entries |= additional_hashes(temporary)
        save_file(tensors, temporary, entries)
        reports.append(report)

    write_atomically(path, write)
    return reports[0]


def write_folder(target: ExportTarget, job: ExportJob, folder: Path, header: dict[str, str]) -> ExportReport:
    """Writes a folder of whole models, with the header in `diffadapt.json`.

    Raises:
        ValueError: the folder has content, or a program that it is meant for does not read it right.
    """
    is_taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if is_taken and not job.force:
        raise ValueError(f"{folder} already exists; choose another name, or replace it with --force")
    # beside its place: a folder can be renamed within a file system only
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.write(job, temporary)
        entries = header | target.header(job)
        text = json.dumps(entries, indent=1, sort_keys=True) + "\n"
        (temporary / "diffadapt.json").write_text(text, encoding="utf-8")
        report = ExportReport(
            folder,
            target.name,
            len(job.layers),
            tuple(target.verify(job, temporary)),
            target.meant_for,
            lost_in_rounding=_lost_in_rounding(job.layers, job.dtype),
            note=note_on_guidance(job.adapter, job.layers),
        )
        refuse_unless_good(report, job.force)
        _replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


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


def _lost_in_rounding(layers: Sequence[ExportedLayer], dtype: torch.dtype) -> float:
    """`|W' - rounded W'| / |W' - W|` over all layers and biases; 0 in float32."""
    if dtype == torch.float32:
        return 0.0
    squared_error = squared_change = 0.0
    for layer in layers:
        adapted = layer.adapted
        squared_error += (adapted - adapted.to(dtype).double()).square().sum().item()
        squared_change += (adapted - layer.weight).square().sum().item()
        if layer.bias is not None and layer.base_bias is not None:
            bias = layer.base_bias + layer.bias
            squared_error += (bias - bias.to(dtype).double()).square().sum().item()
            squared_change += layer.bias.square().sum().item()
    return (squared_error / squared_change) ** 0.5 if squared_change else 0.0


def _replace_folder(temporary: Path, folder: Path) -> None:
    """Moves a finished folder to its place; one that was there before is removed last."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)
