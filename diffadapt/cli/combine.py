"""`diffadapt combine`: several adapters, each at its strength, as one file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffadapt.formats.adapter_file import base_named_in
from diffadapt.models.sampling_columns import parse_adapter_spec

if TYPE_CHECKING:
    from diffadapt.formats.edit.open_adapters import OpenedAdapters

BASE = (
    "write diffadapt's format, with this base; without it, files of products of factors are written in "
    "their own format, and others take the base they name"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE[:STRENGTH]", help="adapter files; strength 1 unless given")
    add("--out", required=True, help="the file to write")
    add("--base", "--pretrained_model_name_or_path", dest="base", help=BASE)


def combine(arguments: argparse.Namespace) -> str:
    """Writes the file; returns what to say."""
    from diffadapt.formats.edit.resize_combine import combined

    files = [parse_adapter_spec(text, strength=1.0) for text in arguments.files]
    opened = open_adapters([(file.path, file.strength) for file in files], arguments.base)
    changes, error = combined(opened.layers())
    dense = sum(change.form == "dense" for change in changes.values())
    written = opened.write(changes, arguments.out, {"combined_from": " + ".join(arguments.files)})
    return (
        f"{written}: {len(changes)} layers, {len(changes) - dense} by joined factors, {dense} as whole "
        f"differences; relative error {error:.2e}"
    )


def open_adapters(files: Sequence[tuple[str, float]], base: str | None) -> OpenedAdapters:
    """Opens adapter files (path, strength) on a base; without one, on none where they need none."""
    from diffadapt.formats.edit.open_adapters import BaseNeeded, open_on_base, open_without_base
    from diffadapt.models.open_pipeline import open_pipeline

    if base is None:
        try:
            return open_without_base(files)
        except BaseNeeded as needed:
            try:
                base = base_named_in([path for path, _ in files])
            except ValueError as nameless:
                raise ValueError(f"{needed}; {nameless}") from needed
    return open_on_base(files, open_pipeline(base), base)
