"""Computes which base can be trained on which GPU: docs/memory.md.

    python eval/benchmarks/memory_table.py --output docs/memory.md

Nothing is measured: bytes are counted from the published configurations (published_bases.py), on the meta
device, as `--dry_run` counts them. The text around the tables is in memory_page.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from published_bases import BASES, PublishedBase
from torch import nn

import diffadapt as da
from diffadapt.common import runtime
from diffadapt.models.block_offload import outermost_blocks
from diffadapt.models.families import family_of_pipeline
from diffadapt.training.options import TrainOptions
from diffadapt.training.stage_memory import StageMemory, denoiser_bytes, dequantised_bytes, stage_memory

TEXT = Path(__file__).with_name("memory_page.md")
GIB = 2**30
CARDS = (8, 12, 16, 24)  # GiB
RESERVE = 1  # GiB of a card for CUDA itself and for gaps between tensors
RESOLUTION = 1024
RANK = 16
PRECISIONS = ("int8", "nf4")  # of the denoiser, from the most exact one


@dataclass(frozen=True)
class Row:
    """The memory of one base in bytes.

    Attributes:
        name: of the base.
        parameters: of the denoiser.
        stages: by name, with weights in bfloat16.
        saved: bytes less on the device, by precision of the denoiser.
        offloaded: the denoiser on the device by number of resident blocks, from 1 on.
    """

    name: str
    parameters: int
    stages: dict[str, StageMemory]
    saved: dict[str, int]
    offloaded: list[int]

    @property
    def largest(self) -> int:
        """Of the stages with the denoiser."""
        return max(self.stages["train"].total, self.stages["sample"].total)

    def with_blocks(self, resident: int) -> int:
        """`largest` with a number of blocks on the device."""
        return self.largest - self.offloaded[-1] + self.offloaded[resident - 1]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="docs/memory.md", help="page to write (default: docs/memory.md)")
    arguments = parser.parse_args(argv)
    runtime.silence_libraries()
    rows = [count(base) for base in BASES]
    Path(arguments.output).write_text(page(rows), encoding="utf-8")
    return 0


def count(base: PublishedBase, *, resolution: int = RESOLUTION, rank: int = RANK) -> Row:
    """The memory of one base with LoRA on the attention layers and AdamW."""
    pipe = base.make()
    family = family_of_pipeline(base.pipeline)
    model = family(pipe, base.name, family.profile_of_family)
    adapter = da.attach(pipe, da.LoRA(rank=rank), targets="attention")
    model.denoiser.enable_gradient_checkpointing()
    stages = stage_memory(model, adapter, TrainOptions(), resolution=resolution, batch_size=1)
    blocks = len(outermost_blocks(model.denoiser))
    saved = {precision: saved_bytes(model.denoiser, precision) for precision in PRECISIONS}
    return Row(
        base.name,
        sum(parameter.numel() for parameter in model.denoiser.parameters()),
        {stage.name: stage for stage in stages},
        saved,
        [denoiser_bytes(model.denoiser, resident_blocks=resident) for resident in range(1, blocks + 1)],
    )


def saved_bytes(denoiser: nn.Module, precision: str) -> int:
    """Bytes that a quantised denoiser saves; its largest weight is there dequantised once."""
    quantised = denoiser_bytes(denoiser, base_precision=precision)
    return denoiser_bytes(denoiser) - quantised - dequantised_bytes(denoiser, precision)


def page(rows: Sequence[Row]) -> str:
    """The whole page."""
    text = TEXT.read_text(encoding="utf-8")
    return text.replace("STAGES\n", stage_table(rows)).replace("CARDS\n", card_table(rows))


def stage_table(rows: Sequence[Row]) -> str:
    """The stages of each base."""
    names = list(rows[0].stages)
    lines = [
        "| base | denoiser | " + " | ".join(names) + " |\n",
        "|---|---:|" + "---:|" * len(names) + "\n",
    ]
    for row in rows:
        cells = [row.name, f"{row.parameters / 1e9:.1f} B"]
        cells += [f"{stage.total / GIB:.1f}" for stage in row.stages.values()]
        lines.append("| " + " | ".join(cells) + " |\n")
    return "".join(lines)


def card_table(rows: Sequence[Row]) -> str:
    """What makes each base fit on each card."""
    lines = [
        "| base | " + " | ".join(f"{card} GB" for card in CARDS) + " |\n",
        "|---" * (1 + len(CARDS)) + "|\n",
    ]
    for row in rows:
        cells = [row.name] + [card_cell(row, card) for card in CARDS]
        lines.append("| " + " | ".join(cells) + " |\n")
    return "".join(lines)


def card_cell(row: Row, card: int) -> str:
    """The precision that fits on a card, else also the number of blocks that do in bfloat16."""
    usable = (card - RESERVE) * GIB
    ways = []
    if row.largest <= usable:
        ways.append("bf16")
    else:
        precisions = [name for name in PRECISIONS if row.largest - row.saved[name] <= usable]
        ways += precisions[:1]  # the most exact one
        fitting = [n for n in range(1, len(row.offloaded)) if row.with_blocks(n) <= usable]
        if fitting:
            ways.append("1 block" if fitting[-1] == 1 else f"{fitting[-1]} blocks")
    if not ways:
        return "no"
    mark = " †" if row.stages["encode captions"].total > usable else ""
    return " or ".join(ways) + mark


if __name__ == "__main__":
    sys.exit(main())
