"""The page of eval/benchmarks/export_table.py: its frame is export_page.md, and a line for each method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffadapt.formats.export import ExportReport

TEXT = Path(__file__).with_name("export_page.md")
KOHYA_READERS = ("ComfyUI", "A1111", "LyCORIS", "sd-scripts")
CUT_RANK = 8  # of the SVD for diffusers


@dataclass(frozen=True)
class Row:
    """What became of one method in every kind of file: a report, or why there is none.

    Attributes:
        kohya: written even if ComfyUI reads it wrong.
        refusal: the same without force.
        dense: with whole differences in the place of keys that ComfyUI alone reads.
        cut: for diffusers, cut to rank CUT_RANK.
    """

    method: str
    kohya: ExportReport | str
    refusal: ExportReport | str
    dense: ExportReport | str
    diffusers: ExportReport | str
    cut: ExportReport | str
    merged: ExportReport | str


def page(rows: Sequence[Row]) -> str:
    """The whole document."""
    return TEXT.read_text(encoding="utf-8").replace("TABLE\n", table(rows))


def table(rows: Sequence[Row]) -> str:
    """The table, one line a method."""
    head = "| method | ComfyUI | A1111 | LyCORIS | sd-scripts | diffusers `load_lora_weights` | merged |\n"
    lines = [head, "|---" * 7 + "|\n"]
    for row in rows:
        cells = [f"`{row.method}`"]
        cells += [kohya_cell(row, program) for program in KOHYA_READERS]
        cells += [diffusers_cell(row), merged_cell(row.merged)]
        lines.append("| " + " | ".join(cells) + " |\n")
    return "".join(lines)


def kohya_cell(row: Row, program: str) -> str:
    if isinstance(row.kohya, str):
        return f"no: {reason(row.kohya)}"
    verdict = row.kohya.verdict(program)
    if verdict.accepted:
        return "exact"
    if isinstance(row.dense, ExportReport) and row.dense.verdict(program).accepted:
        return "exact with `--dense`"
    if verdict.status == "refused":
        return "refuses the file"
    if program == "ComfyUI":
        return f"no: {reason(str(row.refusal))}"
    return f"wrong ({verdict.share:.0%} off)"


def diffusers_cell(row: Row) -> str:
    if isinstance(row.diffusers, ExportReport):
        return "exact"
    if isinstance(row.cut, ExportReport):
        return f"`--rank {CUT_RANK}`: {row.cut.rank_error:.0%} off"
    return f"no: {reason(row.diffusers)}"


def merged_cell(outcome: ExportReport | str) -> str:
    return "exact" if isinstance(outcome, ExportReport) and outcome.good else f"no: {reason(str(outcome))}"


def reason(message: str) -> str:
    """A few words of an error."""
    if "gain a bias" in message:
        return "stock layers lack the bias"
    if "no file for changed" in message:
        return message.split("no file for changed ")[1].split(";")[0] + " have no keys"
    if "passes by" in message:
        return "it does not know such layers"
    return message.split(";")[0]
