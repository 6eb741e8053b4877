"""Precision of activations in training, sampling and evaluation: from machine, option and launcher.

bf16 pays where the processor computes in it. Where it is emulated (every CPU without AVX512_BF16, AMX or
Arm's bf16, GPUs before compute capability 8.0) it is slower than float32 and less exact.
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
    """What of a device decides.

    Attributes:
        device: type of the torch device: cpu, cuda, ...
        has_bf16: whether it computes in bf16 natively.
    """

    device: str
    has_bf16: bool


@dataclass(frozen=True)
class Precision:
    """A decision.

    Attributes:
        name: "no" (float32), "fp16" or "bf16".
        reason: why, for a summary.
        notices: what a person should know before it is used, a sentence each.
    """

    name: str
    reason: str
    notices: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype | None:
        """Precision of autocast; None without."""
        return DTYPES.get(self.name)

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_precision(option: str | None, device: torch.device, *, preferred: str) -> Precision:
    """The precision on this machine, under this launcher.

    Args:
        option: `--mixed_precision`; None where it is not given.
        preferred: what is used where it is fast: "bf16", "fp16" or "no".

    Raises:
        ValueError: for a precision that the device does not have.
    """
    return resolve_precision(
        _machine(device), option, os.environ.get("ACCELERATE_MIXED_PRECISION"), preferred=preferred
    )


def sampling_precision(option: str | None, device: torch.device) -> Precision:
    """The precision of sampling from files. See `choose_precision`."""
    return choose_precision(option, device, preferred="fp16")


def fast_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast to bf16 where the device computes in it natively; elsewhere float32, as it is."""
    if not _machine(device).has_bf16:
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def resolve_precision(
    machine: Machine, option: str | None, launcher: str | None, *, preferred: str
) -> Precision:
    """The option counts, then the launcher, then what is fast on the machine.

    Args:
        launcher: value of ACCELERATE_MIXED_PRECISION. `accelerate launch` exports "no" where nobody chose
            anything, so "no" leaves the decision open.

    Raises:
        ValueError: for a precision that does not exist here.
    """
    if option is not None:
        precision = _as_demanded(machine, option, "--mixed_precision")
        if launcher not in (None, "no", option):
            notice = f"--mixed_precision {option} is used, not the {launcher} of accelerate launch"
            return Precision(option, precision.reason, (notice, *precision.notices))
        return precision
    if launcher not in (None, "no"):
        return _as_demanded(machine, launcher, "accelerate launch --mixed_precision")
    return _fast(machine, preferred)


def _as_demanded(machine: Machine, name: str, source: str) -> Precision:
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
    """What the base or the command prefers, as far as the machine is fast in it."""
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
        features: instruction sets by torch's names, as `torch.cpu.get_capabilities` lists them.
        environment: may limit oneDNN to an older instruction set.
    """
    limit = environment.get("ONEDNN_MAX_CPU_ISA", environment.get("DNNL_MAX_CPU_ISA", "DEFAULT"))
    if limit.upper() in ISA_WITHOUT_BF16 or not torch.backends.mkldnn.is_available():
        return False
    kind = "arm" if platform.machine().lower() in ("arm64", "aarch64") else "x86"
    return any(bool(features.get(name)) for name in BF16_FEATURES[kind])


def _cpu_features() -> Mapping[str, object]:
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    return {  # older torch tells of x86 alone
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
    }
