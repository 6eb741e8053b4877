"""`diffadapt combine`: several adapters, each at its strength, as one file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import diffadapt as da

if TYPE_CHECKING:
    from diffadapt.without_base import Opened

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
    from diffadapt.compress import combined

    opened = open_adapters([with_strength(text) for text in arguments.files], arguments.base)
    forms, error = combined(opened.adapters)
    whole = sum(form.form == "dense" for form in forms.values())
    written = opened.write(forms, arguments.out, {"combined_from": " + ".join(arguments.files)})
    return (
        f"{written}: {len(forms)} layers, {len(forms) - whole} by joined factors, {whole} as whole "
        f"differences; relative error {error:.2e}"
    )


def with_strength(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH; a colon that is part of an existing path is left alone."""
    head, colon, tail = text.rpartition(":")
    if colon and not Path(text).exists():
        with suppress(ValueError):
            return head, float(tail)
    return text, 1.0


def open_adapters(files: Sequence[tuple[str, float]], base: str | None) -> Opened:
    """Adapter files (path, strength) on a base; without one, on none where they need none."""
    from diffadapt.models.any_pipeline import open_pipeline
    from diffadapt.without_base import BaseNeeded, Opened, open_without_base

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


def base_named_in(paths: Sequence[str]) -> str:
    """The base that all files name. Raises ValueError when one names none or they differ."""
    bases = {path: da.read_metadata(path)["adapter"]["base"]["name"] for path in paths}
    if None in bases.values():
        nameless = next(path for path, base in bases.items() if base is None)
        raise ValueError(f"{nameless} does not name its base; give it with --base")
    if len(set(bases.values())) > 1:
        listed = ", ".join(f"{path}: {base}" for path, base in bases.items())
        raise ValueError(f"the adapters were trained on different bases ({listed}); choose one with --base")
    return next(iter(bases.values()))
