"""`diffadapt combine`: several adapters, each at its strength, as one file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

import diffadapt as da
from diffadapt.formats.adapter_file import base_named_in
from diffadapt.models.sampling_columns import parse_adapter_spec

if TYPE_CHECKING:
    from diffadapt.formats.edit.placeholder_model import Opened

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
    forms, error = combined(opened.adapters)
    whole = sum(form.form == "dense" for form in forms.values())
    written = opened.write(forms, arguments.out, {"combined_from": " + ".join(arguments.files)})
    return (
        f"{written}: {len(forms)} layers, {len(forms) - whole} by joined factors, {whole} as whole "
        f"differences; relative error {error:.2e}"
    )


def open_adapters(files: Sequence[tuple[str, float]], base: str | None) -> Opened:
    """Adapter files (path, strength) on a base; without one, on none where they need none."""
    from diffadapt.formats.edit.placeholder_model import BaseNeeded, Opened, open_without_base
    from diffadapt.models.open_pipeline import open_pipeline

    if base is None:
        try:
            return open_without_base(files)
        except BaseNeeded as needed:
            try:
                base = base_named_in([path for path, _ in files])
            except ValueError as nameless:
                raise ValueError(f"{needed}; {nameless}") from needed
    pipe = open_pipeline(base)
    adapters = [
        da.load(pipe, path, strength=strength, name=f"adapter-{number}")
        for number, (path, strength) in enumerate(files)
    ]
    return Opened(adapters, base=base)
