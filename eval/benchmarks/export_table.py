"""Exports every method to every format and tabulates which programs read the files: docs/export.md.

    python eval/benchmarks/export_table.py --output docs/export.md

Every registered method is attached to a small random UNet, moved away from its start and exported; the table
holds the verdicts of the other programs' restated arithmetic. The text around it is in export_page.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

import diffadapt as da
from diffadapt.formats.export import ExportReport

TEXT = Path(__file__).with_name("export_page.md")
DENOISER = "attention+conv+linear"
KOHYA_READERS = ("ComfyUI", "A1111", "LyCORIS", "sd-scripts")
CUT_RANK = 8  # of the SVD for diffusers
Outcome = ExportReport | str  # of an export: its report, or why there is none

# Method, with options worth a line of their own -> options of `attach` beyond the defaults.
CASES: dict[str, dict[str, str]] = {
    "lora(rank=4)": {},
    "lora(rank=4, conv_reshape=loralib)": {},
    "pissa(rank=4)": {},
    "flora(rank=4)": {},
    "1lora": {},
    "vera(rank=16)": {},
    "mora(rank=2)": {},
    "mora(rank=2, type=6)": {},
    "loha(rank=4)": {},
    "lokr(rank=2)": {},
    "dora(rank=4)": {},
    "liera(rank=4)": {},
    "liera(rank=4, order=exp)": {},
    "liera(rank=4, inner=dora)": {},
    "superlora(rank=2, reshape=False)": {},
    "superlora(rank=2)": {},
    "superlora(rank=2, projection=linear_v2, rho=0.5)": {},
    "full": {},
    "bitfit": {"targets": "conv+*.to_out.0+*.ff.net.*"},
    "gamma": {},
    "norms": {"targets": "norm"},
    "difffit": {},
    "difffit(beta=False)": {},
    "difffit(norms=False, gamma=False)": {},
    "class_embedding": {"targets": "class_embedding"},
    "1lora+norms": {},
    "lora(rank=4)+bitfit": {"targets": "conv+*.to_out.0+*.ff.net.*"},
}


@dataclass(frozen=True)
class Row:
    """The outcomes of one method's exports.

    Attributes:
        method: with its options.
        kohya: written even if ComfyUI reads it wrong.
        refusal: the same without force.
        dense: with whole differences in the place of keys that only ComfyUI reads.
        diffusers: for `load_lora_weights`.
        cut: for diffusers, cut to rank CUT_RANK.
        merged: a whole pipeline.
    """

    method: str
    kohya: Outcome
    refusal: Outcome
    dense: Outcome
    diffusers: Outcome
    cut: Outcome
    merged: Outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="docs/export.md", help="page to write (default: docs/export.md)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [export_all(method) for method in CASES]
    Path(arguments.output).write_text(page(rows), encoding="utf-8")
    return 0


def export_all(method: str) -> Row:
    """Exports one trained adapter in every way."""
    unet = small_unet(num_classes=5 if method == "class_embedding" else None)
    adapter = da.attach(unet, da.make_method(method), CASES[method].get("targets", DENOISER))
    move_from_start(adapter)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file.safetensors"
        return Row(
            method,
            kohya=try_export(adapter, file, "kohya", force=True),
            refusal=try_export(adapter, file, "kohya"),
            dense=try_export(adapter, file, "kohya", dense=True, force=True),
            diffusers=try_export(adapter, file, "diffusers"),
            cut=try_export(adapter, file, "diffusers", rank=CUT_RANK),
            merged=try_export(adapter, Path(folder) / "merged", "merged"),
        )


def try_export(adapter: da.Adapter, path: Path, to: str, **options: object) -> Outcome:
    """The report of an export, or why it was refused."""
    try:
        return da.export(adapter, path, to, **options)
    except ValueError as error:
        return str(error)


@torch.no_grad()
def move_from_start(adapter: da.Adapter) -> None:
    """Adds noise to every trained tensor, so that the adapter changes the weights."""
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            parameter.add_(noise.to(parameter), alpha=0.05)


def small_unet(*, num_classes: int | None) -> UNet2DConditionModel:
    """A random UNet of Stable Diffusion's architecture."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
        num_class_embeds=num_classes,
    )


def page(rows: Sequence[Row]) -> str:
    """The whole page."""
    return TEXT.read_text(encoding="utf-8").replace("TABLE\n", table(rows))


def table(rows: Sequence[Row]) -> str:
    """The table, one line per method."""
    lines = [
        "| method | ComfyUI | A1111 | LyCORIS | sd-scripts | diffusers `load_lora_weights` | merged |\n",
        "|---" * 7 + "|\n",
    ]
    for row in rows:
        cells = [f"`{row.method}`"]
        cells += [kohya_cell(row, program) for program in KOHYA_READERS]
        cells += [diffusers_cell(row), merged_cell(row.merged)]
        lines.append("| " + " | ".join(cells) + " |\n")
    return "".join(lines)


def kohya_cell(row: Row, program: str) -> str:
    """How a program reads the kohya file."""
    if isinstance(row.kohya, str):
        return f"no: {short_reason(row.kohya)}"
    verdict = row.kohya.verdict(program)
    if verdict.accepted:
        return "exact"
    if isinstance(row.dense, ExportReport) and row.dense.verdict(program).accepted:
        return "exact with `--dense`"
    if verdict.status == "refused":
        return "refuses the file"
    if program == "ComfyUI":
        return f"no: {short_reason(str(row.refusal))}"
    return f"wrong ({verdict.share:.0%} off)"


def diffusers_cell(row: Row) -> str:
    """How diffusers reads its file."""
    if isinstance(row.diffusers, ExportReport):
        return "exact"
    if isinstance(row.cut, ExportReport):
        return f"`--rank {CUT_RANK}`: {row.cut.rank_error:.0%} off"
    return f"no: {short_reason(row.diffusers)}"


def merged_cell(outcome: Outcome) -> str:
    """Whether the merged pipeline is exact."""
    if isinstance(outcome, ExportReport) and outcome.good:
        return "exact"
    return f"no: {short_reason(str(outcome))}"


def short_reason(message: str) -> str:
    """A few words of an error message."""
    if "gain a bias" in message:
        return "stock layers lack the bias"
    if "no file for changed" in message:
        return message.split("no file for changed ")[1].split(";")[0] + " have no keys"
    if "keys ignored" in message:
        return "it does not know such layers"
    return message.split(";")[0]


if __name__ == "__main__":
    sys.exit(main())
