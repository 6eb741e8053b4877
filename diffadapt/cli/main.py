"""Entry point of the command line: `diffadapt COMMAND`."""

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass

import diffadapt as da
from diffadapt.cli import combine, export, extract, params, resize
from diffadapt.common.exit_codes import run_command
from diffadapt.models.sampling_options import add_sampling_options

EPILOG = """\
examples:
  diffadapt params --model stabilityai/stable-diffusion-xl-base-1.0 --adapter "lora(rank=8)"
  diffadapt sample --adapter adapter.safetensors --prompt "a photo of a sks dog"
  diffadapt export adapter.safetensors for_comfyui.safetensors --to kohya

`diffadapt COMMAND --help` describes the options of a command. Training has scripts of its own, which take
`--help` too: train_scripts/dreambooth.py, style_transfer.py and class_conditional.py.
"""


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        help: one line for the list of commands, and the description of its own help.
        example: a command line that shows its use.
        add_options: adds its options to a parser.
        run: runs it with the parsed options; returns the exit code.
    """

    help: str
    example: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: list[str] | None = None) -> int:
    """Runs `diffadapt` with these arguments, by default those of the process. Returns the exit code."""
    arguments = _make_parser().parse_args(argv)
    command = COMMANDS[arguments.command]
    return run_command(lambda: command.run(arguments))  # argparse itself ends with 2 for bad options


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffadapt",
        description=da.__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=da.__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",  # `capitalize` would lower the rest
            epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_options(subparser)
    return parser


def _add_methods_options(parser: argparse.ArgumentParser) -> None:
    """`diffadapt methods` has no options."""


def _run_methods(arguments: argparse.Namespace) -> int:
    print("Methods for --adapter, with their default options:\n")
    for name, method in da.METHODS.items():
        summary = (method.__doc__ or "").splitlines()[0].replace("`", "")
        fields = [f"{field.name}={field.default}" for field in dataclasses.fields(method)]
        options = ", ".join(fields)
        print(f"{name}: {summary}")
        print(f"    options: {options or 'none'}")
        print(f"    learning rate: {method.learning_rate:g}\n")
    print('Give options in parentheses, and join methods with +: --adapter "lora(rank=8)+norms".')
    return 0


def _add_info_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="adapter file")
    parser.add_argument("--json", action="store_true", help="print the whole header as JSON")


def _run_info(arguments: argparse.Namespace) -> int:
    metadata = da.read_metadata(arguments.file)
    if arguments.json:
        print(json.dumps(metadata, indent=1))
        return 0
    adapter = metadata.pop("adapter")  # JSON of its own; the other entries are short texts
    print(f"{'method':<18} {json.dumps(adapter['method'])}")
    print(f"{'base':<18} {adapter['base']['name']}")
    print(f"{'layers':<18} {len(adapter['sites'])}")
    for name, value in metadata.items():
        print(f"{name:<18} {value}")
    return 0


def _add_sample_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--adapter",
        action="append",
        required=True,
        metavar="FILE[:STRENGTH]",
        help="adapter file; repeat to apply several adapters together",
    )
    add(
        "--grid_adapters",
        action="store_true",
        help="apply each adapter alone and show them side by side, instead of all together",
    )
    add("--compare", action="store_true", help="also generate with the base model alone, from the same seeds")
    add("--out", default="runs/sample", help="output folder (default: runs/sample)")
    add(
        "--strength",
        default="1",
        help="strength of adapters that have none of their own (default: 1); a list such as 0,0.5,1 "
        "generates a column for each",
    )
    add_sampling_options(parser, num_images=4)


def _run_sample(arguments: argparse.Namespace) -> int:
    # These modules import diffusers, which takes seconds; the other commands do without.
    from diffadapt.cli.sample import sample
    from diffadapt.common.runtime import silence_libraries

    silence_libraries()
    folder = sample(arguments, command=shlex.join(["diffadapt", *sys.argv[1:]]))
    record = json.loads((folder / "sample.json").read_text(encoding="utf-8"))
    print(f"{len(record['images'])} images in {folder}, all on {folder / 'sheet.png'}")
    return 0


def _print_result(function: Callable[[argparse.Namespace], object]) -> Callable[[argparse.Namespace], int]:
    """A command that prints what a function returns, and exits with 0."""

    def run(arguments: argparse.Namespace) -> int:
        print(function(arguments))
        return 0

    return run


COMMANDS = {
    "methods": Command(
        "list the adapter methods and their options",
        "diffadapt methods",
        _add_methods_options,
        _run_methods,
    ),
    "params": Command(
        "count the parameters an adapter would train, without loading weights",
        'diffadapt params --model path/to/unet/config.json --adapter "flora(rank=8)"',
        params.add_options,
        _print_result(params.params),
    ),
    "info": Command(
        "show what an adapter file contains",
        "diffadapt info adapter.safetensors",
        _add_info_options,
        _run_info,
    ),
    "sample": Command(
        "generate images with one or more adapters",
        'diffadapt sample --adapter adapter.safetensors --prompt "a photo of a sks dog" --compare',
        _add_sample_options,
        _run_sample,
    ),
    "export": Command(
        "convert an adapter to another program's format and verify the result",
        "diffadapt export adapter.safetensors for_comfyui.safetensors --to kohya",
        export.add_options,
        _print_result(export.export),
    ),
    "resize": Command(
        "reduce the rank of an adapter",
        "diffadapt resize adapter.safetensors smaller.safetensors --rank 8",
        resize.add_options,
        _print_result(resize.resize),
    ),
    "combine": Command(
        "combine several adapters into one file",
        "diffadapt combine dog.safetensors style.safetensors:0.5 --out both.safetensors",
        combine.add_options,
        _print_result(combine.combine),
    ),
    "extract": Command(
        "extract an adapter from a fine-tuned model and its base",
        "diffadapt extract --finetuned tuned --base base --rank 16 --out adapter.safetensors",
        extract.add_options,
        _print_result(extract.extract),
    ),
}
