"""`diffadapt combine`: combine several adapters, each at its strength, into one file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffadapt.formats.adapter_file import base_named_in
from diffadapt.models.sampling_columns import parse_adapter_spec

if TYPE_CHECKING:
    from diffadapt.formats.edit.open_adapters import OpenedAdapters

BASE_HELP = (
    "base model of the adapters; the file is then written in diffadapt's format. By default, low-rank files "
    "keep their format and no base is loaded, and other files take the base they name"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `diffadapt combine`."""
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE[:STRENGTH]", help="adapter files; the default strength is 1")
    add("--out", required=True, help="file to write")
    add("--base", "--pretrained_model_name_or_path", dest="base", help=BASE_HELP)


def combine(arguments: argparse.Namespace) -> str:
    """Writes the combined file. Returns a summary to print."""
    from diffadapt.formats.edit.resize_combine import combined  # here, as `--help` needs none of it

    files = []
    for text in arguments.files:
        file = parse_adapter_spec(text, strength=1.0)
        files.append((file.path, file.strength))
    opened = open_adapters(files, arguments.base)
    changes, error = combined(opened.layers())
    dense_count = 0
    for change in changes.values():
        if change.form == "dense":
            dense_count += 1
    path = opened.write(changes, arguments.out, {"combined_from": " + ".join(arguments.files)})
    joined_count = len(changes) - dense_count
    return (
        f"{path}: {len(changes)} layers, {joined_count} by joined factors, {dense_count} as whole "
        f"differences; relative error {error:.2e}"
    )


def open_adapters(files: Sequence[tuple[str, float]], base: str | None) -> OpenedAdapters:
    """Opens adapter files for editing.

    Args:
        files: (path, strength) of each file.
        base: the base model. Without it, files that do not depend on the weights of their base are opened
            without one; others are loaded on the base that they name.

    Raises:
        ValueError: the files need a base, but name none or different ones.
    """
    from diffadapt.formats.edit.open_adapters import BaseNeeded, open_on_base, open_without_base
    from diffadapt.models.open_pipeline import open_pipeline  # imports diffusers, which takes seconds

    if base is None:
        try:
            return open_without_base(files)
        except BaseNeeded as base_needed:
            # such as DoRA, whose change is another one on another base
            try:
                base = base_named_in([path for path, _ in files])
            except ValueError as no_base:
                raise ValueError(f"{base_needed}; {no_base}") from base_needed
    return open_on_base(files, open_pipeline(base), base)
