"""Adapters in the files of other programs, proven against each program's arithmetic when they are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from diffadapt.adapters.adapter import Adapter
from diffadapt.common.messages import did_you_mean
from diffadapt.formats.adapter_file import read_metadata
from diffadapt.formats.export.checks import DTYPES, check_dtype, check_rank
from diffadapt.formats.export.exported_layer import exported_layers
from diffadapt.formats.export.layer_names import base_architecture
from diffadapt.formats.export.metadata import metadata_of, training_metadata
from diffadapt.formats.export.report import ExportReport
from diffadapt.formats.export.target import ExportJob, ExportTarget
from diffadapt.formats.export.targets import DEFAULT_TARGET, TARGETS
from diffadapt.formats.export.verify import Verdict
from diffadapt.formats.export.write import write_file, write_folder

__all__ = [
    "DTYPES",
    "TARGETS",
    "ExportReport",
    "ExportTarget",
    "Verdict",
    "export",
    "parse_formats",
    "write_formats",
]


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
        to: `kohya` (ComfyUI, A1111, LyCORIS; of transformers ComfyUI and diffusers), `diffusers`
            (`load_lora_weights`) or `merged` (a whole pipeline, or the model alone that was attached to).
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
    if to not in TARGETS:
        raise ValueError(f"cannot export to {to!r}{did_you_mean(to, TARGETS)}")
    target = TARGETS[to]
    check_dtype(dtype)
    check_rank(rank, to, [name for name, other in TARGETS.items() if other.takes_rank])
    job = ExportJob(adapter, exported_layers(adapter), DTYPES[dtype], rank, dense, force)
    job = replace(job, layers=target.fit(job))
    path = Path(path)
    title = path.stem if path.suffix == ".safetensors" else path.name
    header = metadata_of(adapter, base_architecture(adapter), title=title, base_name=base, extra=metadata)
    if target.is_folder:
        return write_folder(target, job, path, header)
    return write_file(target, job, path, header)


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
        path = file.with_name(f"{file.stem}{TARGETS[name].ending}")
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
        return [DEFAULT_TARGET]
    names = [name.strip() for name in formats.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--export_formats {formats!r} names no format; give {', '.join(TARGETS)} or none")
    if names == ["none"]:
        return []
    if "none" in names:
        raise ValueError(
            f"--export_formats {formats}: none excludes other formats; leave it out, or the others"
        )
    for name in names:
        if name not in TARGETS:
            raise ValueError(
                f"--export_formats: unknown format {name!r}{did_you_mean(name, [*TARGETS, 'none'])}"
            )
    return names
