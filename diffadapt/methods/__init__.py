"""Methods, one per file, and their registry. A new method is a class here and a line in `METHODS`."""

from __future__ import annotations

from diffadapt.methods.base import Method
from diffadapt.methods.bias_scale_norm import BitFit, Gamma, Norms
from diffadapt.methods.class_embedding import ClassEmbedding
from diffadapt.methods.combined import Combined
from diffadapt.methods.difffit import DiffFit
from diffadapt.methods.dora import DoRA
from diffadapt.methods.flora import FLoRA
from diffadapt.methods.full import Full
from diffadapt.methods.imported import Imported
from diffadapt.methods.liera import LieRA
from diffadapt.methods.loha import LoHa
from diffadapt.methods.lokr import LoKr
from diffadapt.methods.lora import LoRA
from diffadapt.methods.mora import MoRA
from diffadapt.methods.onelora import OneLoRA
from diffadapt.methods.pissa import PiSSA
from diffadapt.methods.ranked import RankedMethod
from diffadapt.methods.superlora import SuperLoRA
from diffadapt.methods.vera import VeRA

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        LoRA,
        DoRA,
        VeRA,
        MoRA,
        PiSSA,
        LoHa,
        LoKr,
        FLoRA,
        LieRA,
        SuperLoRA,
        OneLoRA,
        BitFit,
        DiffFit,
        Gamma,
        Norms,
        ClassEmbedding,
        Full,
    )
}

# the methods that an adapter file can hold
READABLE = {**METHODS, Imported.name: Imported}

__all__ = [
    "METHODS",
    "READABLE",
    "BitFit",
    "ClassEmbedding",
    "Combined",
    "DiffFit",
    "DoRA",
    "FLoRA",
    "Full",
    "Gamma",
    "LieRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "Method",
    "MoRA",
    "Norms",
    "OneLoRA",
    "PiSSA",
    "RankedMethod",
    "SuperLoRA",
    "VeRA",
]
