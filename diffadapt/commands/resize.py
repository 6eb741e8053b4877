"""`diffadapt resize`: the same adapter at a smaller rank."""

import argparse

import diffadapt as da


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="IN", help="an adapter file: ours, kohya, LyCORIS, PEFT, diffusers")
    add("out", metavar="OUT", help="the file to write")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, help="the largest rank of a layer")
    size.add_argument(
        "--energy", type=float, help="share of each layer's squared change to keep, such as 0.9"
    )
    add("--base", "--pretrained_model_name_or_path", dest="base", help="default: the base named in the file")


def resize(arguments: argparse.Namespace) -> str:
    """Writes the file; returns what to say."""
    from diffadapt.commands.combine import base_named_in
    from diffadapt.compress import replaced, resized
    from diffadapt.models.any_pipeline import open_pipeline

    base = arguments.base or base_named_in([arguments.file])
    adapter = da.load(open_pipeline(base), arguments.file)
    before = adapter.num_parameters
    forms, kept = resized(adapter, rank=arguments.rank, energy=arguments.energy)
    smaller = replaced([adapter], forms)
    da.save(smaller, arguments.out, base=base, metadata={"resized_from": arguments.file})
    ranks = sorted({form.rank for form in forms.values() if form.rank})
    return (
        f"{arguments.out}: {smaller.num_parameters:,} values, {before:,} before; ranks "
        f"{ranks[0] if ranks else 0} to {ranks[-1] if ranks else 0}; {100 * kept:.4f} % of the energy kept"
    )
