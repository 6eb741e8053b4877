"""Parameter-efficient fine-tuning of diffusion models."""

import os

# torch reads this variable when it first allocates memory. Large CPU tensors are then allocated in pages of 2
# MB (Linux): handing out pages of 4 KB takes longer than filling them. See docs/training.md, "Precision and
# threads".
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import diffadapt.common.launcher  # notes the process's launcher before the slow imports
import diffadapt.models.families  # noqa: F401 - tells attaching and exporting what the families' layers are

# isort: split
# The names listed here are the public API.

from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.attach import attach, attached, detach, disabled
from diffadapt.adapters.budget import count_parameters, fit_budget
from diffadapt.adapters.merge import merge, unmerge
from diffadapt.assets import embedded
from diffadapt.formats.adapter_file import load, read_metadata, save
from diffadapt.formats.export import ExportReport, export
from diffadapt.methods import (
    METHODS,
    BitFit,
    ClassEmbedding,
    DiffFit,
    DoRA,
    FLoRA,
    Full,
    Gamma,
    LieRA,
    LoHa,
    LoKr,
    LoRA,
    MoRA,
    Norms,
    OneLoRA,
    PiSSA,
    SuperLoRA,
    VeRA,
)
from diffadapt.methods.parse_method import make_method

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Adapter",
    "BitFit",
    "ClassEmbedding",
    "DiffFit",
    "DoRA",
    "ExportReport",
    "FLoRA",
    "Full",
    "Gamma",
    "LieRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "MoRA",
    "Norms",
    "OneLoRA",
    "PiSSA",
    "SuperLoRA",
    "VeRA",
    "attach",
    "attached",
    "count_parameters",
    "detach",
    "disabled",
    "embedded",
    "export",
    "fit_budget",
    "load",
    "make_method",
    "merge",
    "read_metadata",
    "save",
    "unmerge",
]
