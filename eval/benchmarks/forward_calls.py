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


@dataclass(frozen=True)
class Calls:
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
    rows = {variant: measure(variant) for variant in arguments.variants}
    page = _page(rows)
    if arguments.output is None:
        print(page)
    else:
        arguments.output.write_text(page, encoding="utf-8")


def measure(variant: str) -> Calls:
    """Counts the calls of one forward.

    Args:
        variant: `diffadapt:METHOD` or `peft:NAME`, as in `cost_rivals.make`.
    """
    package, _, _ = variant.partition(":")
    model = cost_rivals.make(_OneLayer(), variant, "layer", RANK)
    x = torch.randn(2, 5, 64)
    model(x)  # what is imported or computed once is not part of every forward
    return count_calls(model, x, Path(importlib.import_module(package).__file__).parent)


def count_calls(model: nn.Module, x: Tensor, package: Path) -> Calls:
    """Counts the calls into files of a package during one forward.

    Args:
        model: called with `x`.
        package: folder of the package.
    """
    functions: list[tuple[str, str, int]] = []  # file, name and line of every call
    depth = deepest = 0

    def note(frame: FrameType, event: str, _: object) -> None:
        nonlocal depth, deepest
        code = frame.f_code
        if not Path(code.co_filename).is_relative_to(package):
            return
        if event == "call":
            functions.append((code.co_filename, code.co_name, code.co_firstlineno))
            depth += 1
            deepest = max(deepest, depth)
        elif event == "return":
            depth -= 1

    previous = sys.getprofile()
    sys.setprofile(note)
    try:
        model(x)
    finally:
        sys.setprofile(previous)
    files = {file for file, _, _ in functions}
    return Calls(len(files), len(set(functions)), len(functions), deepest)


def _page(rows: dict[str, Calls]) -> str:
    lines = [INTRODUCTION, "| | files | functions | calls | depth |", "|---|---:|---:|---:|---:|"]
    lines += [_row(variant, calls) for variant, calls in rows.items()]
    python = ".".join(map(str, sys.version_info[:2]))
    return "\n".join([*lines, "", f"Python {python}; {cost_page.versions()}.", ""])


def _row(variant: str, calls: Calls) -> str:
    cells: Sequence[int] = (calls.files, calls.functions, calls.calls, calls.depth)
    return f"| {variant} | {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
