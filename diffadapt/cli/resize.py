"""`diffadapt resize`: reduce the rank of an adapter."""

import argparse

from diffadapt.cli.combine import BASE_HELP, open_adapters


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `diffadapt resize`."""
    add = parser.add_argument
    add("file", metavar="IN", help="adapter file of diffadapt, kohya, LyCORIS, PEFT or diffusers")
    add("out", metavar="OUT", help="file to write; for PEFT, the folder")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, help="largest rank of a layer")
    size.add_argument(
        "--energy", type=float, help="share of the squared weight change to keep in each layer, such as 0.9"
    )
    add("--base", "--pretrained_model_name_or_path", dest="base", help=BASE_HELP)


def resize(arguments: argparse.Namespace) -> str:
    """Writes the resized file. Returns a summary to print."""
    from diffadapt.formats.edit.resize_combine import resized

    opened = open_adapters([(arguments.file, 1.0)], arguments.base)  # (path, strength)
    values_before = opened.num_parameters
    changes, energy_share = resized(opened.layers(), rank=arguments.rank, energy=arguments.energy)
    path = opened.write(changes, arguments.out, {"resized_from": arguments.file})
    values_after = 0
    ranks = []
    for change in changes.values():
        for tensor in change.tensors.values():
            values_after += tensor.numel()
        if change.rank:  # biases and norms have none
            ranks.append(change.rank)
    return (
        f"{path}: {values_after:,} values, {values_before:,} before; ranks {min(ranks, default=0)} to "
        f"{max(ranks, default=0)}; {100 * energy_share:.4f} % of the energy kept"
    )
