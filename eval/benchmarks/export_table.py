"""The page docs/export.md: which program reads which method's files, and how exactly, from the verifier.

    python eval/benchmarks/export_table.py --output docs/export.md

Every registered method is attached to a small random UNet, moved away from its start and exported; the table
holds what the programs' restated arithmetic made of the files.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from export_page import CUT_RANK, Row, page

import diffadapt as da
from diffadapt.formats.export import ExportReport

DENOISER = "attention+conv+linear"

# Method (with options worth a line of their own) -> what it needs beyond the defaults.
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


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="docs/export.md", help="the page to write")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    Path(arguments.output).write_text(page([measured(method) for method in CASES]), encoding="utf-8")
    return 0


def measured(method: str) -> Row:
    """Exports one trained adapter in every way."""
    unet = small_unet(classes=5 if method == "class_embedding" else None)
    adapter = da.attach(unet, da.make_method(method), CASES[method].get("targets", DENOISER))
    move(adapter)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "file.safetensors"
        return Row(
            method,
            kohya=tried(adapter, out, "kohya", force=True),
            refusal=tried(adapter, out, "kohya"),
            dense=tried(adapter, out, "kohya", dense=True, force=True),
            diffusers=tried(adapter, out, "diffusers"),
            cut=tried(adapter, out, "diffusers", rank=CUT_RANK),
            merged=tried(adapter, Path(folder) / "merged", "merged"),
        )


def tried(adapter: da.Adapter, path: Path, to: str, **options: object) -> ExportReport | str:
    """The report, or why there is none."""
    try:
        return da.export(adapter, path, to, **options)
    except ValueError as error:
        return str(error)


@torch.no_grad()
def move(adapter: da.Adapter) -> None:
    """Change every trained tensor, so that the adapter does something."""
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            parameter.add_(noise.to(parameter), alpha=0.05)


def small_unet(*, classes: int | None) -> UNet2DConditionModel:
    """A random UNet of Stable Diffusion's kind."""
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
        num_class_embeds=classes,
    )


if __name__ == "__main__":
    sys.exit(main())
