"""How much package code one forward of an adapted layer runs: docs/forward_calls.md.

    python eval/benchmarks/forward_calls.py --output docs/forward_calls.md

One Linear layer, in a forward that will be differentiated. Only functions of the packages themselves are
counted, not torch's: it is what somebody has to read to follow a forward.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import cost_page
import cost_rivals
import torch
from torch import Tensor, nn

RANK = 4
VARIANTS = ("diffadapt:lora", "peft:lora", "diffadapt:flora", "diffadapt:dora", "peft:dora")
INTRODUCTION = """# Calls of a forward

Made by `python eval/benchmarks/forward_calls.py --output docs/forward_calls.md`: code of the package that
one forward of one adapted Linear layer runs, without torch's. Files and functions are counted once, calls
each time; depth is the longest chain of calls within the package.
"""
TREE = """## The way through a forward

The calls of `{variant}` in their order, indented by depth.
"""


@dataclass(frozen=True)
class Call:
    """A call of a function of the package.

    Attributes:
        file: the function's file, in the package.
        function: its name.
        line: where it begins.
        depth: how many calls of the package it is nested in.
    """

    file: str
    function: str
    line: int
    depth: int


@dataclass(frozen=True)
class Counts:
    """Code of one package that a forward runs.

    Attributes:
        files: files of these functions.
        functions: different functions.
        calls: calls of them.
        depth: the deepest nesting of these calls.
    """

    files: int
    functions: int
    calls: int
    depth: int


class _OneLayer(nn.Module):
    """A model of one layer; adapters may be kept beside it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), metavar="PACKAGE:METHOD")
    parser.add_argument("--output", type=Path, help="where to write the page (default: print it)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    page = _page({variant: trace(variant) for variant in arguments.variants})
    if arguments.output is None:
        print(page)
    else:
        arguments.output.write_text(page, encoding="utf-8")


def trace(variant: str) -> list[Call]:
    """The calls of one forward in their order.

    Args:
        variant: `diffadapt:METHOD` or `peft:NAME`, as in `cost_rivals.make`.
    """
    package, _, _ = variant.partition(":")
    model = cost_rivals.make(_OneLayer(), variant, "layer", RANK)
    x = torch.randn(2, 5, 64)
    model(x)  # what is imported or computed once is not part of every forward
    return trace_calls(model, x, Path(importlib.import_module(package).__file__).parent)


def trace_calls(model: nn.Module, x: Tensor, package: Path) -> list[Call]:
    """The calls of functions in files of a package during one forward.

    Args:
        model: called with `x`.
        package: folder of the package.
    """
    calls: list[Call] = []
    depth = 0

    def note(frame: FrameType, event: str, _: object) -> None:
        nonlocal depth
        code = frame.f_code
        path = Path(code.co_filename)
        if not path.is_relative_to(package):
            return
        if event == "call":
            function = getattr(code, "co_qualname", code.co_name)  # since Python 3.11
            file = path.relative_to(package).as_posix()
            calls.append(Call(file, function.split(".<locals>.")[-1], code.co_firstlineno, depth))
            depth += 1
        elif event == "return":
            depth -= 1

    previous = sys.getprofile()
    sys.setprofile(note)
    try:
        model(x)
    finally:
        sys.setprofile(previous)
    return calls


def count(calls: Sequence[Call]) -> Counts:
    """Counts the files, functions and calls of a forward."""
    files = {call.file for call in calls}
    functions = {(call.file, call.function, call.line) for call in calls}
    return Counts(len(files), len(functions), len(calls), max(call.depth for call in calls) + 1)


def _page(traces: dict[str, list[Call]]) -> str:
    lines = [INTRODUCTION, "| | files | functions | calls | depth |", "|---|---:|---:|---:|---:|"]
    for variant, calls in traces.items():
        counts = count(calls)
        lines.append(f"| {variant} | {counts.files} | {counts.functions} | {counts.calls} | {counts.depth} |")
    first_variant = next(iter(traces))
    lines += ["", TREE.format(variant=first_variant), "```"]
    for call in traces[first_variant]:
        lines.append(f"{'  ' * call.depth}{call.function}  ({call.file})")
    python = ".".join(map(str, sys.version_info[:2]))
    return "\n".join([*lines, "```", "", f"Python {python}; {cost_page.versions()}.", ""])


if __name__ == "__main__":
    main()
