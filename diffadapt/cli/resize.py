"""`diffadapt resize`: the same adapter at a smaller rank."""

import argparse

from diffadapt.cli.combine import BASE, open_adapters


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="IN", help="an adapter file: ours, kohya, LyCORIS, PEFT, diffusers")
    add("out", metavar="OUT", help="the file to write, for a PEFT folder the folder")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, help="the largest rank of a layer")
    size.add_argument(
        "--energy", type=float, help="share of each layer's squared change to keep, such as 0.9"
    )
    add("--base", "--pretrained_model_name_or_path", dest="base", help=BASE)


def resize(arguments: argparse.Namespace) -> str:
    """Writes the file; returns what to say."""
    from diffadapt.formats.edit.resize_combine import resized

    opened = open_adapters([(arguments.file, 1.0)], arguments.base)
    before = opened.num_parameters
    changes, kept = resized(opened.layers(), rank=arguments.rank, energy=arguments.energy)
    written = opened.write(changes, arguments.out, {"resized_from": arguments.file})
    after = sum(tensor.numel() for change in changes.values() for tensor in change.tensors.values())
    ranks = sorted({change.rank for change in changes.values() if change.rank})
    return (
        f"{written}: {after:,} values, {before:,} before; ranks "
        f"{ranks[0] if ranks else 0} to {ranks[-1] if ranks else 0}; {100 * kept:.4f} % of the energy kept"
    )
