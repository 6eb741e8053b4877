"""`diffadapt combine`: several adapters, each at its strength, as one file."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import diffadapt as da


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE[:STRENGTH]", help="adapter files; strength 1 unless given")
    add("--out", required=True, help="the file to write")
    add("--base", "--pretrained_model_name_or_path", dest="base", help="default: the base named in the files")


def combine(arguments: argparse.Namespace) -> str:
    """Writes the file; returns what to say."""
    from diffadapt.compress import combined, replaced
    from diffadapt.models.any_pipeline import open_pipeline

    files = [with_strength(text) for text in arguments.files]
    base = arguments.base or base_named_in([path for path, _ in files])
    pipe = open_pipeline(base)
    adapters = [
        da.load(pipe, path, strength=strength, name=f"adapter-{index}")
        for index, (path, strength) in enumerate(files)
    ]
    forms, error = combined(adapters)
    whole = sum(form.form == "dense" for form in forms.values())
    adapter = replaced(adapters, forms)
    da.save(adapter, arguments.out, base=base, metadata={"combined_from": " + ".join(arguments.files)})
    return (
        f"{arguments.out}: {len(forms)} layers, {len(forms) - whole} by joined factors, {whole} as whole "
        f"differences; relative error {error:.2e}"
    )


def with_strength(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH; a colon that is part of an existing path is left alone."""
    head, colon, tail = text.rpartition(":")
    if colon and not Path(text).exists():
        try:
            return head, float(tail)
        except ValueError:
            pass
    return text, 1.0


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
