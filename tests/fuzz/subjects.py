"""Whole files to start from, one of every kind that diffadapt opens, and what opens each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from helpers.method_cases import train
from helpers.models import denoiser
from safetensors.torch import load_file, save_file
from torch import Tensor

import diffadapt as da

METHODS = (
    *("lora(rank=2)", "flora(rank=2)", "dora(rank=2)", "pissa(rank=2)", "vera(rank=2)", "mora(rank=2)"),
    *("loha(rank=1)", "lokr(rank=1)", "liera(rank=2)", "1lora(compression=random)", "1lora+norms", "difffit"),
    *("superlora(rank=1)", "superlora(rank=1,groups=2,projection=linear,rho=0.5)"),
    *("class_embedding(classes=9)", "peft:LOHA(r=2)"),
)


@dataclass(frozen=True)
class Subject:
    """A whole file: its header's metadata, tensors, and for PEFT folders the configuration beside it."""

    name: str
    header: dict[str, str]
    tensors: dict[str, Tensor]
    file_name: str = "adapter.safetensors"
    config: dict | None = None

    @property
    def is_own(self) -> bool:
        return self.header.get("format") == "diffadapt"

    def write(self, folder: Path) -> Path:
        """Writes the file (and the configuration), and returns what is opened."""
        path = folder / self.file_name
        save_file(self.tensors, path, self.header)
        if self.config is not None:
            (folder / "adapter_config.json").write_text(json.dumps(self.config), encoding="utf-8")
        return path


def subjects(folder: Path) -> list[Subject]:
    """Files of every method of ours, and of every kind of other tools."""
    return [*(_own(method, folder) for method in METHODS), *_foreign()]


def _own(method: str, folder: Path) -> Subject:
    is_table = method.startswith("class_embedding")
    targets = "class_embedding" if is_table else "conv_in+depthwise+attention"
    if method.startswith("peft"):
        targets = "attention"
    adapter = da.attach(denoiser(), da.make_method(method), targets, seed=7)
    train(adapter)
    path = folder / "whole.safetensors"
    da.save(adapter, path, base="embedded:emoji", metadata={"instance_prompt": "a photo"})
    return Subject(method, _metadata(path), load_file(path))


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def _foreign() -> list[Subject]:
    def draw(*shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))

    pair = {"lora_down.weight": draw(2, 8), "lora_up.weight": draw(8, 2), "alpha": torch.tensor(1.0)}
    half = {
        "hada_w1_a": draw(8, 2),
        "hada_w1_b": draw(2, 8),
        "hada_w2_a": draw(8, 2),
        "hada_w2_b": draw(2, 8),
    }
    first = {"lora_down.weight": draw(2, 4, 1, 1), "lora_up.weight": draw(8, 2, 1, 1)}
    kinds = {
        "kohya LoRA": ("blocks_0_to_q", pair),
        "kohya LoCon, Tucker": (
            "conv_in",
            {**first, "lora_mid.weight": draw(2, 2, 3, 3), "alpha": torch.tensor(2.0)},
        ),
        "kohya DoRA": ("blocks_1_to_out_0", {**pair, "dora_scale": draw(1, 8).abs()}),
        "LyCORIS LoHa": ("blocks_0_to_k", half),
        "LyCORIS LoKr": ("blocks_0_to_v", {"lokr_w1": draw(2, 2), "lokr_w2": draw(4, 4)}),
        "LyCORIS full": ("conv_out", {"diff": draw(4, 8, 1, 1), "diff_b": draw(4)}),
        "LyCORIS norms": ("norm", {"w_norm": draw(8), "b_norm": draw(8)}),
    }
    kohya = [
        Subject(kind, {"ss_network_module": "x"}, {f"lora_unet_{layer}.{key}": t for key, t in own.items()})
        for kind, (layer, own) in kinds.items()
    ]
    return [*kohya, *_peft_and_diffusers(draw)]


def _peft_and_diffusers(draw) -> list[Subject]:
    said = {
        "unet.r": 2,
        "unet.lora_alpha": 4,
        "unet.rank_pattern": {},
        "unet.alpha_pattern": {"blocks.0.to_q": 1},
    }
    factors = {"lora_A.weight": draw(2, 8), "lora_B.weight": draw(8, 2)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": True, "alpha_pattern": {"to_q": 3}}
    vera = {"vera_lambda_b": draw(8), "vera_lambda_d": draw(2)}
    shared = {"base_model.vera_A": draw(2, 8), "base_model.vera_B": draw(8, 2)}
    prefix, file = "base_model.model.blocks.0.to_q.", "adapter_model.safetensors"
    return [
        Subject(
            "diffusers",
            {"lora_adapter_metadata": json.dumps(said)},
            {f"unet.blocks.0.to_q.{key}": t for key, t in factors.items()},
        ),
        Subject("PEFT LoRA", {"format": "pt"}, {prefix + k: t for k, t in factors.items()}, file, config),
        Subject(
            "PEFT VeRA",
            {"format": "pt"},
            {**{prefix + k: t for k, t in vera.items()}, **shared},
            file,
            {"peft_type": "VERA", "r": 2, "projection_prng_key": 0, "save_projection": True},
        ),
    ]
