"""`diffadapt export`: convert an adapter file to another program's format, and verify the result."""

import argparse
from pathlib import Path

import diffadapt as da
from diffadapt.formats.export import DTYPES, TARGETS, ExportReport
from diffadapt.formats.export.metadata import training_metadata


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `diffadapt export`."""
    add = parser.add_argument
    add("file", help="adapter file")
    add("out", help="file to write (.safetensors), or folder of a merged pipeline")
    add(
        "--to",
        required=True,
        choices=tuple(TARGETS),
        help="target format; kohya is for ComfyUI, A1111 and LyCORIS",
    )
    add(
        "--pretrained_model_name_or_path",
        "--base",
        dest="base",
        help="base model (default: the one named in the file)",
    )
    add("--revision", help="branch, tag or commit of a base on the hub")
    add("--variant", help="variant of the base's files, such as fp16")
    add("--strength", type=float, default=1.0, help="adapter strength to apply in the file (default: 1)")
    add(
        "--rank",
        type=int,
        help="diffusers: rank of the low-rank approximation of changes that are not low-rank products",
    )
    add("--dtype", choices=tuple(DTYPES), default="float32", help="dtype of the file (default: float32)")
    add(
        "--dense",
        action="store_true",
        help="kohya: store whole weight differences where only ComfyUI reads compact keys",
    )
    add(
        "--force",
        action="store_true",
        help="write the file even if a program it is meant for would read it incorrectly",
    )


def export(arguments: argparse.Namespace) -> ExportReport:
    """Loads the base and the adapter, and writes the exported file.

    Returns:
        The programs that can read the file, and how exactly.
    """
    from diffadapt.models.open_pipeline import open_pipeline  # imports diffusers, which takes seconds

    metadata = da.read_metadata(arguments.file)
    base = arguments.base
    if not base:  # a file of another program has no adapter entry; one saved in Python may name no base
        adapter_header = metadata.get("adapter", {})
        base = (adapter_header.get("base") or {}).get("name")
    if not base:
        raise ValueError(f"{arguments.file} does not name its base; give it with --base")
    if not TARGETS[arguments.to].is_folder and Path(arguments.out).suffix != ".safetensors":
        raise ValueError(f"{arguments.out}: the file's name must end in .safetensors")
    pipe = open_pipeline(base, revision=arguments.revision, variant=arguments.variant)
    adapter = da.load(pipe, arguments.file, strength=arguments.strength)
    return da.export(
        adapter,
        arguments.out,
        arguments.to,
        rank=arguments.rank,
        dtype=arguments.dtype,
        dense=arguments.dense,
        force=arguments.force,
        base=base,
        metadata=training_metadata(metadata),
    )
