"""A written file, read back with each program's own arithmetic and compared with the live adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffadapt.export.changes import Change
from diffadapt.export.names import Base, clip_path, found_by_a1111, found_by_comfyui, kohya_name
from diffadapt.export.programs import Layer, Program, Refused
from diffadapt.export.programs.a1111 import A1111
from diffadapt.export.programs.comfyui import COMFYUI
from diffadapt.export.programs.lycoris import LYCORIS
from diffadapt.export.programs.peft import DIFFUSERS, DIFFUSERS_KOHYA
from diffadapt.export.programs.sd_scripts import SD_SCRIPTS

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


def verify_kohya(path: str, changes: Sequence[Change], base: Base, dtype: torch.dtype) -> list[Verdict]:
    """Verdicts of every program that reads kohya's key names."""
    names = [kohya_name(change.component, change.path, base) for change in changes]
    grouped = _grouped(load_file(path), lambda key: tuple(key.split(".", 1)))
    in_sd_scripts = [not base.is_sdxl or change.component != "unet" for change in changes]
    everywhere = [True] * len(changes)
    found = (
        (COMFYUI, [found_by_comfyui(change) for change in changes]),
        (A1111, [found_by_a1111(change, base) for change in changes]),
        (LYCORIS, everywhere),
        (SD_SCRIPTS, in_sd_scripts),
        (DIFFUSERS_KOHYA, ["add_embedding" not in change.path for change in changes]),
    )
    return [_verdict(program, names, finds, grouped, changes, dtype) for program, finds in found]


def verify_diffusers(path: str, changes: Sequence[Change], dtype: torch.dtype) -> list[Verdict]:
    """The verdict of stock diffusers on a file with PEFT's keys."""
    names = [f"{change.component}.{clip_path(change.component, change.path)}" for change in changes]
    grouped = _grouped(load_file(path), _peft_key)
    return [_verdict(DIFFUSERS, names, [True] * len(names), grouped, changes, dtype)]


def compared(
    changes: Sequence[Change], results: Iterable[tuple[Tensor, Tensor | None]], dtype: torch.dtype
) -> tuple[float, float, bool]:
    """The largest difference from the live adapter, its share of the change, and whether every layer is what
    the file was meant to give, up to rounding."""
    largest = error = changed = 0.0
    as_meant = True
    for change, (weight, bias) in zip(changes, results, strict=True):
        meant_bias = _bias(change.base_bias, change.bias)
        bias_off = _difference(bias, meant_bias)
        off = weight - change.adapted
        largest = max(largest, *(_largest(part) for part in (off, bias_off)))
        error += off.square().sum().item() + bias_off.square().sum().item()
        for value, start in ((change.adapted, change.weight), (meant_bias, change.base_bias)):
            if value is not None:
                changed += (value if start is None else value - start).square().sum().item()
        for part, meant, start in (
            (weight - change.target(), change.target(), change.weight),
            (bias_off, meant_bias, change.base_bias),
        ):
            as_meant &= _largest(part) <= _tolerance(meant, start, dtype)
    share = math.sqrt(error / changed) if changed else 0.0
    return largest, share, as_meant


def _verdict(
    program: Program,
    names: Sequence[str],
    finds: Sequence[bool],
    grouped: Mapping[str, Mapping[str, Tensor]],
    changes: Sequence[Change],
    dtype: torch.dtype,
) -> Verdict:
    results, ignored = [], []
    try:
        for name, found, change in zip(names, finds, changes, strict=True):
            layer = Layer(name, change.kind, change.weight, change.base_bias, change.layer, found)
            keys = grouped.get(name, {})
            if not keys or not found:
                results.append((layer.weight, layer.bias))
                ignored += [f"{name}.{key}" for key in keys]
                continue
            result = program.apply(layer, keys)
            results.append((result.weight, result.bias))
            ignored += [f"{name}.{key}" for key in sorted(result.ignored)]
    except Refused as refusal:
        return Verdict(program.name, program.version, "refused", reason=str(refusal))
    largest, share, as_meant = compared(changes, results, dtype)
    if not as_meant:
        reason = (
            f"it passes by {len(ignored)} keys, e.g. {ignored[0]}" if ignored else "it computes otherwise"
        )
        return Verdict(program.name, program.version, "wrong", largest, share, reason)
    rounded = dtype != torch.float32 or any(change.approximated for change in changes)
    reason = "as asked for" if rounded else ""
    status = "approximate" if rounded else "exact"
    return Verdict(program.name, program.version, status, largest, share, reason)


def _grouped(tensors: Mapping[str, Tensor], split) -> dict[str, dict[str, Tensor]]:
    """Tensors by layer and key, float64."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, end = split(key)
        grouped.setdefault(name, {})[end] = tensor.double()
    return grouped


def _peft_key(key: str) -> tuple[str, str]:
    for end, name in _PEFT_ENDS.items():
        if key.endswith(f".{end}"):
            return key.removesuffix(f".{end}"), name
    raise Refused(f"diffusers knows no key {key}")


def _bias(base: Tensor | None, change: Tensor | None) -> Tensor | None:
    if change is None:
        return base
    return change if base is None else base + change


def _difference(bias: Tensor | None, meant: Tensor | None) -> Tensor:
    if bias is None and meant is None:
        return torch.zeros(1, dtype=torch.float64)
    if bias is None or meant is None:
        return bias if meant is None else meant
    return bias - meant


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
