"""Measures where the time of a training step goes, by kind of operator: docs/cost_profile.md.

    python eval/benchmarks/cost_profile.py --output docs/cost_profile.md
    python eval/benchmarks/cost_profile.py --base tiny --methods lora liera naive:liera

Self time of the operators, every method in turns; the median over rounds is shown.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import cost_models
import cost_page
import cost_rivals
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

RANK = 16
KINDS = {  # kind -> pattern of the names of its operators, without aten::
    "products": r"(add|badd|b)?b?mm|(add)?mv|dot|matmul|linear|einsum",
    "convolutions": r".*conv.*",
    "attention": r".*(attention|softmax).*",
    "norms and activations": r".*(norm|silu|gelu).*",
    "element by element": r"mul|add|sub|div|addcmul|addcdiv|exp|neg|copy|fill|zero",
}
OTHER = "all else"
DEFAULT = ("floor", "peft:lora", "lora", "flora", "liera", "naive:liera", "superlora", "naive:superlora")
INTRODUCTION = """# Where a training step's time goes

Made by `python eval/benchmarks/cost_profile.py --rounds {rounds} --output docs/cost_profile.md`: seconds of
self time of the operators in one training step, by kind of operator; {title}, rank {rank}, batch size 1,
float32; rows measured in turns, median over rounds. Times under the profiler are longer than in
[cost.md](cost.md) and comparable with each other only.
"""


def main() -> None:
    """Profiles the methods and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", choices=cost_models.SIZES, default="sd15", help="model (default: sd15)")
    parser.add_argument("--targets", default="attention", help="adapted layers (default: attention)")
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT), metavar="VARIANT", help="table rows")
    parser.add_argument("--rounds", type=int, default=3, help="profiled steps of each row (default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--output", type=Path, help="page to write (default: print it)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    base = cost_models.build(arguments.base)
    inputs = cost_models.inputs(base, arguments.base, 1)
    models = {name: _make(base, name, arguments.targets) for name in arguments.methods}
    rounds: dict[str, list[Counter]] = {name: [] for name in models}
    for _ in range(arguments.rounds):
        for name, model in models.items():
            rounds[name].append(seconds_by_kind(model, inputs.loss))
    page = _page(rounds, arguments)
    if arguments.output is None:
        print(page)
    else:
        arguments.output.write_text(page, encoding="utf-8")


def seconds_by_kind(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Counter:
    """Kind of operator -> seconds of self time in one training step of the model."""
    model.train()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        loss(model).backward()
    model.zero_grad(set_to_none=True)
    seconds: Counter = Counter()
    for event in profiler.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6  # from microseconds
    return seconds


def kind_of(operator: str) -> str:
    """The kind of an operator by its name, such as aten::addmm."""
    name = operator.removeprefix("aten::").removesuffix("_")
    for kind, pattern in KINDS.items():
        if re.fullmatch(pattern, name):
            return kind
    return OTHER


def _make(base: nn.Module, name: str, targets: str) -> nn.Module:
    """The model of a row; a name without a maker is a method of this package."""
    has_maker = name == "floor" or ":" in name.partition("(")[0]
    variant = name if has_maker else f"diffadapt:{name}"
    return cost_rivals.make(base, variant, targets, RANK)


def _page(rounds: dict[str, Sequence[Counter]], arguments: argparse.Namespace) -> str:
    kinds = [*KINDS, OTHER]
    lines = [f"| | {' | '.join(kinds)} | together |", "|---|" + "---:|" * (len(kinds) + 1)]
    for name, steps in rounds.items():
        seconds = []
        for kind in kinds:
            seconds.append(median(step[kind] for step in steps))
        seconds.append(median(step.total() for step in steps))
        cells = " | ".join(f"{value:.2f}" for value in seconds)
        lines.append(f"| {name} | {cells} |")
    title = f"base `{arguments.base}`, {arguments.targets}"
    introduction = INTRODUCTION.format(title=title, rank=RANK, rounds=arguments.rounds)
    machine = f"Measured with {arguments.threads} threads; {cost_page.versions()}."
    return "\n".join([introduction, *lines, "", machine, ""])


if __name__ == "__main__":
    main()
