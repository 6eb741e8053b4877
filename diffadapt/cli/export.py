"""`diffadapt export`: an adapter file in another program's format, proven before it exists."""

import argparse
from pathlib import Path

import diffadapt as da
from diffadapt.formats.export import DTYPES, KINDS, ExportReport
from diffadapt.formats.export.metadata import carried


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", help="an adapter file")
    add("out", help="file to write (.safetensors), or the folder of a merged pipeline")
    add("--to", required=True, choices=KINDS, help="kohya is for ComfyUI, A1111 and LyCORIS")
    add("--pretrained_model_name_or_path", "--base", dest="base", help="default: the base named in the file")
    add("--revision", help="of a base on the hub")
    add("--variant", help="of the base's files, e.g. fp16")
    add("--strength", type=float, default=1.0, help="folded into the file (default: 1)")
    add("--rank", type=int, help="diffusers: rank of what replaces changes that are no thin products")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="precision of the file (default: float32)")
    add("--dense", action="store_true", help="kohya: whole differences where ComfyUI alone reads small keys")
    add("--force", action="store_true", help="write it even if a program it is meant for reads it wrong")


def export(arguments: argparse.Namespace) -> ExportReport:
    """Loads the base and the adapter, and writes what was asked for. Returns who reads it and how exactly."""
    from diffadapt.models.open_pipeline import open_pipeline  # imports diffusers, which takes seconds

    metadata = da.read_metadata(arguments.file)
    recorded = metadata.get("adapter", {})
    base = arguments.base or (recorded.get("base") or {}).get("name")
    if not base:
        raise ValueError(f"{arguments.file} does not name its base; give it with --base")
    if arguments.to != "merged" and Path(arguments.out).suffix != ".safetensors":
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
        metadata=carried(metadata),
    )
