"""The command line: `diffadapt COMMAND`. One function adds a command's options, one runs it."""

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


@dataclass(frozen=True)
class Command:
    """One subcommand."""

    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: list[str] | None = None) -> int:
    """Entry point of `diffadapt`. Returns the exit code; 2 for mistakes of the user."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: COMMANDS[arguments.command].run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="diffadapt", description=da.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=da.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.help, description=command.help, allow_abbrev=False)
        command.add_options(own)
    return parser


def _no_options(parser: argparse.ArgumentParser) -> None:
    pass


def _run_methods(arguments: argparse.Namespace) -> int:
    for name, method in da.METHODS.items():
        summary = (method.__doc__ or "").splitlines()[0]
        options = ", ".join(f"{field.name}={field.default}" for field in dataclasses.fields(method))
        print(f"{name:<10} {summary}\n{'':<10} options: {options}; learning rate {method.learning_rate:g}\n")
    return 0


def _info_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="an adapter file")
    parser.add_argument("--json", action="store_true", help="everything in the header, as JSON")


def _run_info(arguments: argparse.Namespace) -> int:
    metadata = da.read_metadata(arguments.file)
    if arguments.json:
        print(json.dumps(metadata, indent=1))
        return 0
    adapter = metadata.pop("adapter")
    print(f"{'method':<18} {json.dumps(adapter['method'])}")
    print(f"{'base':<18} {adapter['base']['name']}")
    print(f"{'layers':<18} {len(adapter['sites'])}")
    for name, value in metadata.items():
        print(f"{name:<18} {value}")
    return 0


def _sample_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--adapter", action="append", required=True, metavar="FILE[:STRENGTH]", help="several are added up")
    add("--grid_adapters", action="store_true", help="the adapters side by side instead of added up")
    add("--compare", action="store_true", help="the bare base as well, with the same seeds")
    add("--out", default="runs/sample", help="folder for the images (default: runs/sample)")
    add("--strength", default="1", help="of adapters without their own (default: 1); 0,0.5,1 draws each")
    add_sampling_options(parser, num_images=4)


def _run_sample(arguments: argparse.Namespace) -> int:
    from diffadapt.cli.sample import sample  # imports diffusers, which takes seconds
    from diffadapt.common.runtime import silence_libraries

    silence_libraries()
    folder = sample(arguments, command=shlex.join(["diffadapt", *sys.argv[1:]]))
    count = len(json.loads((folder / "sample.json").read_text(encoding="utf-8"))["images"])
    print(f"{count} images in {folder}, all on {folder / 'sheet.png'}")
    return 0


def _printing(text: Callable[[argparse.Namespace], str]) -> Callable[[argparse.Namespace], int]:
    def run_it(arguments: argparse.Namespace) -> int:
        print(text(arguments))
        return 0

    return run_it


COMMANDS = {
    "methods": Command("the adapter methods and their options", _no_options, _run_methods),
    "params": Command(
        "what an adapter would train, from a config alone", params.add_options, _printing(params.params)
    ),
    "info": Command("what is in an adapter file", _info_options, _run_info),
    "export": Command(
        "an adapter in another program's format, proven when it is written",
        export.add_options,
        _printing(export.export),
    ),
    "resize": Command("the same adapter at a smaller rank", resize.add_options, _printing(resize.resize)),
    "extract": Command(
        "an adapter from a fine-tuned model and its base",
        extract.add_options,
        _printing(extract.extract),
    ),
    "combine": Command("several adapters as one file", combine.add_options, _printing(combine.combine)),
    "sample": Command("draw images with one or more adapters", _sample_options, _run_sample),
}
