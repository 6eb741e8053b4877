"""A written file, read back with each program's own arithmetic and compared with the live adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffadapt.adapters.architectures import Architecture
from diffadapt.formats.emulators import Layer, Program, Refused, Result, with_bias
from diffadapt.formats.emulators.a1111 import A1111
from diffadapt.formats.emulators.comfyui import COMFYUI
from diffadapt.formats.emulators.lycoris import LYCORIS
from diffadapt.formats.emulators.peft import DIFFUSERS, DIFFUSERS_KOHYA
from diffadapt.formats.emulators.sd_scripts import SD_SCRIPTS
from diffadapt.formats.export.exported_layer import ExportedLayer
from diffadapt.formats.export.layer_names import (
    clip_path,
    found_by_a1111,
    found_by_comfyui,
    found_by_sd_scripts,
    kohya_name,
)

# Ends of the keys in files for diffusers, and PEFT's names for them.
_PEFT_ENDS = {
    "lora_linear_layer.down.weight": "lora_A.weight",
    "lora_linear_layer.up.weight": "lora_B.weight",
    "lora_linear_layer.up.bias": "lora_B.bias",
    "lora_A.weight": "lora_A.weight",
    "lora_B.weight": "lora_B.weight",
    "lora_B.bias": "lora_B.bias",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
}


@dataclass(frozen=True)
class Verdict:
    """What one program makes of a file.

    Attributes:
        program, version: the program, and the version whose arithmetic was restated.
        status: ``exact``; ``approximate`` (as asked for, by a rank or half precision); ``wrong`` (it opens
            the file and renders something else); ``refused``.
        max_error: the largest difference of a weight or bias from the live adapter's.
        share: of the whole change, in Frobenius norms, that the difference amounts to.
        reason: for all but exact.
    """

    program: str
    version: str
    status: str
    max_error: float = math.nan
    share: float = math.nan
    reason: str = ""

    @property
    def accepted(self) -> bool:
        return self.status in ("exact", "approximate")

    def __str__(self) -> str:
        numbers = "" if math.isnan(self.max_error) else f"  max error {self.max_error:.1e}"
        numbers += "" if math.isnan(self.share) else f", {self.share:.1e} of the change"
        return f"{self.program} {self.version}: {self.status}{numbers}" + (
            self.reason and f"  ({self.reason})"
        )


def verify_kohya(
    path: str, changes: Sequence[ExportedLayer], base: Architecture, dtype: torch.dtype
) -> list[Verdict]:
    """Verdicts of every program that reads kohya's key names."""
    finds = {
        COMFYUI: found_by_comfyui,
        A1111: lambda change: found_by_a1111(change, base),
        LYCORIS: lambda change: True,
        SD_SCRIPTS: lambda change: found_by_sd_scripts(change, base),
        DIFFUSERS_KOHYA: lambda change: "add_embedding" not in change.path,
    }
    grouped = _grouped(load_file(path), lambda key: tuple(key.split(".", 1)))
    return _verdicts(finds, lambda c: kohya_name(c.component, c.path, base), grouped, changes, dtype)


def verify_diffusers(path: str, changes: Sequence[ExportedLayer], dtype: torch.dtype) -> list[Verdict]:
    """The verdict of stock diffusers on a file with PEFT's keys."""
    grouped = _grouped(load_file(path), _peft_key)
    finds = {DIFFUSERS: lambda change: True}
    return _verdicts(
        finds, lambda c: f"{c.component}.{clip_path(c.component, c.path)}", grouped, changes, dtype
    )


@dataclass
class Tally:
    """Differences from the live adapter, added up layer by layer."""

    dtype: torch.dtype
    largest: float = 0.0
    error: float = 0.0  # squared
    changed: float = 0.0  # squared
    as_meant: bool = True  # whether every layer is what the file was meant to give, up to rounding

    def add(
        self, found: Tensor | None, live: Tensor | None, start: Tensor | None, meant: Tensor | None
    ) -> None:
        """One weight or bias: as found, as the live adapter has it, before, and as the file should give."""
        if live is not None:
            self.changed += (live if start is None else live - start).square().sum().item()
        off = _difference(found, live)
        self.largest = max(self.largest, _largest(off))
        self.error += off.square().sum().item()
        self.as_meant &= _largest(_difference(found, meant)) <= _tolerance(meant, start, self.dtype)

    @property
    def share(self) -> float:
        """Of the whole change, in Frobenius norms, that the differences amount to."""
        return math.sqrt(self.error / self.changed) if self.changed else 0.0


def _verdicts(
    finds: Mapping[Program, Callable[[ExportedLayer], bool]],
    name_of: Callable[[ExportedLayer], str],
    grouped: Mapping[str, Mapping[str, Tensor]],
    changes: Sequence[ExportedLayer],
    dtype: torch.dtype,
) -> list[Verdict]:
    """Every program on one layer after the other: what is as large as a weight lives for one layer."""
    tallies = {program: Tally(dtype) for program in finds}
    ignored: dict[Program, list[str]] = {program: [] for program in finds}
    refused: dict[Program, str] = {}
    for change in changes:
        name, live, meant = name_of(change), change.adapted, change.expected_weight()
        layer = Layer(name, change.kind, change.weight, change.base_bias, change.layer)
        keys = {key: tensor.double() for key, tensor in grouped.get(name, {}).items()}
        bias = with_bias(change.base_bias, change.bias)
        for program, is_found in finds.items():
            result = Result(layer.weight, layer.bias, frozenset(keys))
            try:
                if keys and is_found(change):
                    result = program.apply(layer, keys)
            except Refused as refusal:
                refused.setdefault(program, str(refusal))
            ignored[program] += [f"{name}.{key}" for key in sorted(result.ignored)]
            tallies[program].add(result.weight, live, layer.weight, meant)
            tallies[program].add(result.bias, bias, layer.bias, bias)
    asked = dtype != torch.float32 or any(change.is_approximated for change in changes)
    return [_verdict(p, tallies[p], ignored[p], refused.get(p), asked) for p in finds]


def _verdict(program: Program, tally: Tally, ignored: list[str], refusal: str | None, asked: bool) -> Verdict:
    if refusal:
        return Verdict(program.name, program.version, "refused", reason=refusal)
    status, reason = ("approximate", "as asked for") if asked else ("exact", "")
    if not tally.as_meant:
        status, reason = "wrong", "it computes otherwise"
        if ignored:
            reason = f"it passes by {len(ignored)} keys, e.g. {ignored[0]}"
    return Verdict(program.name, program.version, status, tally.largest, tally.share, reason)


def _grouped(
    tensors: Mapping[str, Tensor], split: Callable[[str], tuple[str, str]]
) -> dict[str, dict[str, Tensor]]:
    """Tensors by layer and key."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, end = split(key)
        grouped.setdefault(name, {})[end] = tensor
    return grouped


def _peft_key(key: str) -> tuple[str, str]:
    for end, name in _PEFT_ENDS.items():
        if key.endswith(f".{end}"):
            return key.removesuffix(f".{end}"), name
    raise Refused(f"diffusers knows no key {key}")


def _difference(found: Tensor | None, meant: Tensor | None) -> Tensor:
    if found is None and meant is None:
        return torch.zeros(1, dtype=torch.float64)
    if found is None or meant is None:
        return found if meant is None else meant
    return found - meant


def _largest(tensor: Tensor) -> float:
    """The largest entry; infinite where one is not a number."""
    value = tensor.abs().max().item()
    return math.inf if math.isnan(value) else value


def _tolerance(meant: Tensor | None, start: Tensor | None, dtype: torch.dtype) -> float:
    """Rounding of the live weight in float32, and of the file's factors in the file's precision."""
    if meant is None:
        return 0.0
    change = meant if start is None else meant - start
    rounding = 2 * torch.finfo(torch.float32).eps * meant.abs().max().item()
    return rounding + 16 * torch.finfo(dtype).eps * change.abs().max().item() + 1e-12
