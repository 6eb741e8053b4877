"""The precision of activations in training, sampling and evaluation, chosen from option, launcher and device.

bf16 pays off where the processor computes in it. Where it is emulated (CPUs without AVX512_BF16, AMX or Arm's
bf16, GPUs before compute capability 8.0) it is slower than float32 and less exact.
"""

import os
import platform
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
CHOICES = ("no", *DTYPES)
# Forward and backward pass of the embedded U-Net at batch 8 on an AMD EPYC with AVX2: CPU time in bf16
# autocast over CPU time in float32 (3.0 s and 0.30 s).
SLOWDOWN_WITHOUT_BF16 = 10
BF16_FEATURES = {"x86": ("avx512_bf16", "amx_bf16"), "arm": ("bf16", "sve_bf16")}
# Values of ONEDNN_MAX_CPU_ISA that keep oneDNN from the bf16 instructions a CPU may have.
# https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html
ISA_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


@dataclass(frozen=True)
class Machine:
    """The properties of a device that decide the precision.

    Attributes:
        device: the type of the torch device: cpu, cuda, ...
        has_bf16: whether it computes in bf16 natively.
    """

    device: str
    has_bf16: bool


@dataclass(frozen=True)
class Precision:
    """The chosen precision and the reason for it.

    Attributes:
        name: "no" (float32), "fp16" or "bf16".
        reason: the reason, for a summary.
        notices: sentences that the user should read before the run.
    """

    name: str
    reason: str
    notices: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of autocast; None without autocast."""
        return DTYPES.get(self.name)

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_precision(option: str | None, device: torch.device, *, preferred: str) -> Precision:
    """Chooses the precision on this device, under this launcher.

    Args:
        option: the value of `--mixed_precision`; None if it is not given.
        device: the device of the run.
        preferred: the precision to use where it is fast: "bf16", "fp16" or "no".

    Raises:
        ValueError: the device does not support the requested precision.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION")
    return resolve_precision(_machine(device), option, launcher, preferred=preferred)


def sampling_precision(option: str | None, device: torch.device) -> Precision:
    """Chooses the precision of sampling from files. See `choose_precision`."""
    return choose_precision(option, device, preferred="fp16")


def fast_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast to bf16 if the device computes in it natively; otherwise no autocast."""
    if not _machine(device).has_bf16:
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def resolve_precision(
    machine: Machine, option: str | None, launcher: str | None, *, preferred: str
) -> Precision:
    """Chooses the precision: the option takes precedence, then the launcher, then what the device does fast.

    Args:
        machine: the device.
        option: the value of `--mixed_precision`; None if it is not given.
        launcher: the value of ACCELERATE_MIXED_PRECISION. `accelerate launch` sets "no" if the user chose
            nothing, so "no" leaves the decision open.
        preferred: the precision to use where it is fast.

    Raises:
        ValueError: the device does not support the requested precision.
    """
    if option is not None:
        precision = _requested(machine, option, "--mixed_precision")
        if launcher in (None, "no", option):
            return precision
        notice = f"--mixed_precision {option} is used, not the {launcher} of accelerate launch"
        return Precision(option, precision.reason, (notice, *precision.notices))
    if launcher not in (None, "no"):
        return _requested(machine, launcher, "accelerate launch --mixed_precision")
    return _fast(machine, preferred)


def _requested(machine: Machine, name: str, source: str) -> Precision:
    """The precision that the user asked for, by the option or launcher named `source`."""
    if name not in CHOICES:
        raise ValueError(f"{source} {name} is not supported; give --mixed_precision {', '.join(CHOICES)}")
    if name == "fp16" and machine.device == "cpu":
        raise ValueError(f"{source} fp16 needs a GPU; on a CPU use bf16 or no (--mixed_precision no)")
    notices = ()
    if name == "bf16" and not machine.has_bf16:
        notices = (_slow_bf16(machine, source),)
    return Precision(name, f"asked for by {source}", notices)


def _slow_bf16(machine: Machine, source: str) -> str:
    if machine.device == "cpu":
        return (
            f"{source} bf16: this CPU computes in float32 and emulates bf16; a step takes about "
            f"{SLOWDOWN_WITHOUT_BF16} times as long as with --mixed_precision no"
        )
    return f"{source} bf16: this device emulates bf16; --mixed_precision fp16 is faster"


def _fast(machine: Machine, preferred: str) -> Precision:
    """The preferred precision, or the nearest one that the device is fast in."""
    device = machine.device
    if preferred == "no":
        return Precision("no", "default of this base")
    if device not in ("cpu", "cuda"):
        return Precision("no", f"half precision was not tried on {device}")
    if device == "cpu" and preferred == "fp16":
        return Precision("no", "default on a CPU")
    if preferred == "bf16" and not machine.has_bf16:
        if device == "cpu":
            return Precision("no", "this CPU has no bf16 instructions")
        return Precision("fp16", "this GPU has no bf16")
    return Precision(preferred, f"fast on this {'CPU' if device == 'cpu' else 'GPU'}")


def _machine(device: torch.device) -> Machine:
    if device.type == "cpu":
        return Machine("cpu", cpu_has_bf16(_cpu_features(), os.environ))
    if device.type == "cuda":
        return Machine("cuda", torch.cuda.is_bf16_supported(including_emulation=False))
    return Machine(device.type, True)


def cpu_has_bf16(features: Mapping[str, object], environment: Mapping[str, str]) -> bool:
    """Whether torch computes in bf16 with instructions of the CPU.

    `torch.ops.mkldnn._is_mkldnn_bf16_supported` does not tell: it is true where AVX-512 emulates bf16.

    Args:
        features: the instruction sets of the CPU, as `torch.cpu.get_capabilities` names them.
        environment: the environment variables, which may limit oneDNN to an older instruction set.
    """
    limit = environment.get("ONEDNN_MAX_CPU_ISA", environment.get("DNNL_MAX_CPU_ISA", "DEFAULT"))
    if limit.upper() in ISA_WITHOUT_BF16 or not torch.backends.mkldnn.is_available():
        return False
    processor = "arm" if platform.machine().lower() in ("arm64", "aarch64") else "x86"
    return any(bool(features.get(name)) for name in BF16_FEATURES[processor])


def _cpu_features() -> Mapping[str, object]:
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    # Older versions of torch know the instruction sets of x86 only.
    return {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
    }
