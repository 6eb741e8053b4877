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

# ends of the keys in files for diffusers, and PEFT's names for them
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

FileKeys = Mapping[str, Mapping[str, Tensor]]  # tensors by layer, and by key within the layer
FindsLayer = Callable[[ExportedLayer], bool]  # whether a program has the layer under its name in the file


@dataclass(frozen=True)
class Verdict:
    """How one program reads a file.

    Attributes:
        program: its name.
        version: the version whose arithmetic was restated.
        status: `exact`; `approximate` (as requested, by a rank or half precision); `wrong` (it opens the file
            and renders something else); `refused`.
        max_error: the largest difference of a weight or bias from the live adapter's.
        share: that difference relative to the whole change, in Frobenius norms.
        reason: of every status but exact.
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
        text = f"{self.program} {self.version}: {self.status}"
        if not math.isnan(self.max_error):
            text += f"  max error {self.max_error:.1e}"
        if not math.isnan(self.share):
            text += f", {self.share:.1e} of the change"
        if self.reason:
            text += f"  ({self.reason})"
        return text


def verify_kohya(
    path: str, layers: Sequence[ExportedLayer], base: Architecture, dtype: torch.dtype
) -> list[Verdict]:
    """Verdicts of every program that reads kohya's key names.

    Args:
        layers: what the file was written from.
        dtype: precision of the file.
    """
    programs: dict[Program, FindsLayer] = {
        COMFYUI: found_by_comfyui,
        A1111: lambda layer: found_by_a1111(layer, base),
        LYCORIS: lambda layer: True,
        SD_SCRIPTS: lambda layer: found_by_sd_scripts(layer, base),
        DIFFUSERS_KOHYA: lambda layer: "add_embedding" not in layer.path,
    }
    file_keys = by_layer(load_file(path), lambda key: tuple(key.split(".", 1)))
    names = [kohya_name(layer.component, layer.path, base) for layer in layers]
    return read_by_programs(programs, file_keys, layers, names, dtype)


def verify_diffusers(path: str, layers: Sequence[ExportedLayer], dtype: torch.dtype) -> list[Verdict]:
    """The verdict of stock diffusers on a file with PEFT's keys."""
    programs: dict[Program, FindsLayer] = {DIFFUSERS: lambda layer: True}
    file_keys = by_layer(load_file(path), _split_peft_key)
    names = [f"{layer.component}.{clip_path(layer.component, layer.path)}" for layer in layers]
    return read_by_programs(programs, file_keys, layers, names, dtype)


@dataclass
class ErrorSum:
    """Differences from the live adapter, added up layer by layer.

    Attributes:
        dtype: precision of the file.
        largest: difference of a weight or bias.
        squared_error: sum over all weights and biases.
        squared_change: of the live adapter, likewise.
        is_as_written: whether every layer is what the file was meant to give, up to rounding.
    """

    dtype: torch.dtype
    largest: float = 0.0
    squared_error: float = 0.0
    squared_change: float = 0.0
    is_as_written: bool = True

    def add(
        self, read: Tensor | None, adapted: Tensor | None, start: Tensor | None, expected: Tensor | None
    ) -> None:
        """Adds one weight or bias; None where there is no such bias.

        Args:
            read: as the program has it.
            adapted: as the live adapter has it.
            start: as the base has it.
            expected: as the file should give it; `adapted` unless it was cut to a rank or rounded.
        """
        if adapted is not None:
            change = adapted if start is None else adapted - start
            self.squared_change += change.square().sum().item()
        error = _difference(read, adapted)
        self.largest = max(self.largest, _largest(error))
        self.squared_error += error.square().sum().item()
        # `not <=` and not `>`: a difference that is not a number is wrong too
        if not _largest(_difference(read, expected)) <= _tolerance(expected, start, self.dtype):
            self.is_as_written = False

    @property
    def share(self) -> float:
        """The error relative to the whole change, in Frobenius norms."""
        return math.sqrt(self.squared_error / self.squared_change) if self.squared_change else 0.0

    def verdict(self, program: str, version: str, *, is_approximate: bool, wrong: str) -> Verdict:
        """The verdict of a program on all that was added.

        Args:
            is_approximate: whether the file was meant to give rounded or cut values.
            wrong: the reason, should the program not give what it was meant to.
        """
        status = "exact"
        reason = ""
        if is_approximate:
            status = "approximate"
            reason = "as requested"
        if not self.is_as_written:
            status = "wrong"
            reason = wrong
        return Verdict(program, version, status, self.largest, self.share, reason)


def read_by_programs(
    programs: Mapping[Program, FindsLayer],
    file_keys: FileKeys,
    layers: Sequence[ExportedLayer],
    names: Sequence[str],
    dtype: torch.dtype,
) -> list[Verdict]:
    """The verdict of every program.

    They read one layer after the other: what is as large as a weight lives for one layer.

    Args:
        programs: each with the function that says whether it has a layer.
        file_keys: the tensors of the file by the names of layers.
        layers: what the file was written from.
        names: of these layers in the file.
        dtype: precision of the file.
    """
    errors: dict[Program, ErrorSum] = {}
    ignored_keys: dict[Program, list[str]] = {}
    refusals: dict[Program, str] = {}
    reasons: dict[Program, str] = {}
    for program in programs:
        errors[program] = ErrorSum(dtype)
        ignored_keys[program] = []
    for exported, name in zip(layers, names, strict=True):
        adapted = exported.adapted
        expected = exported.expected_weight()
        bias = with_bias(exported.base_bias, exported.bias)
        layer = Layer(name, exported.kind, exported.weight, exported.base_bias, exported.layer)
        keys = {key: tensor.double() for key, tensor in file_keys.get(name, {}).items()}
        # all programs see the same float64 values: what they round differently is not judged
        for program, finds_layer in programs.items():
            # a program that does not find the layer, or refuses the file, leaves the layer as it is
            result = Result(layer.weight, layer.bias, frozenset(keys))
            try:
                if keys and finds_layer(exported):
                    result = program.apply(layer, keys)
            except Refused as refusal:
                refusals.setdefault(program, str(refusal))
            if result.reason:
                reasons.setdefault(program, result.reason)
            ignored_keys[program] += [f"{name}.{key}" for key in sorted(result.ignored)]
            errors[program].add(result.weight, adapted, layer.weight, expected)
            errors[program].add(result.bias, bias, layer.bias, bias)
    is_approximate = dtype != torch.float32 or any(layer.is_approximated for layer in layers)
    verdicts = []
    for program in programs:
        if program in refusals:
            verdicts.append(Verdict(program.name, program.version, "refused", reason=refusals[program]))
        else:
            keys = ignored_keys[program]
            wrong = f"{len(keys)} keys ignored, e.g. {keys[0]}" if keys else "result differs"
            if program in reasons:
                wrong = f"{wrong}: {reasons[program]}"
            verdict = errors[program].verdict(
                program.name, program.version, is_approximate=is_approximate, wrong=wrong
            )
            verdicts.append(verdict)
    return verdicts


def by_layer(tensors: Mapping[str, Tensor], split: Callable[[str], tuple[str, str]]) -> FileKeys:
    """Tensors of a file by the name of their layer, and the rest of their key."""
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, end = split(key)
        by_layer.setdefault(name, {})[end] = tensor
    return by_layer


def _split_peft_key(key: str) -> tuple[str, str]:
    for end, peft_name in _PEFT_ENDS.items():
        if key.endswith(f".{end}"):
            return key.removesuffix(f".{end}"), peft_name
    raise Refused(f"diffusers knows no key {key}")


def _difference(first: Tensor | None, second: Tensor | None) -> Tensor:
    """`first - second`, where None counts as zeros; the sign does not matter."""
    if first is None and second is None:
        return torch.zeros(1, dtype=torch.float64)
    if first is None:
        return second
    return first if second is None else first - second


def _largest(tensor: Tensor) -> float:
    """The largest absolute value; infinite where one is not a number."""
    value = tensor.abs().max().item()
    return math.inf if math.isnan(value) else value


def _tolerance(expected: Tensor | None, start: Tensor | None, dtype: torch.dtype) -> float:
    """Rounding of the live weight in float32, and of the file's factors in the file's precision."""
    if expected is None:
        return 0.0
    change = expected if start is None else expected - start
    of_weight = 2 * torch.finfo(torch.float32).eps * expected.abs().max().item()
    of_factors = 16 * torch.finfo(dtype).eps * change.abs().max().item()
    return of_weight + of_factors + 1e-12
