"""A base's denoiser loaded apart from its pipeline: with quantised weights, or from a file of its own."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import diffusers
import torch
from torch import nn

from diffadapt.models.base_names import resolve
from diffadapt.models.from_config import denoiser_from_config

QUANTISED = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}  # precision -> package
FILE_SUFFIXES = (".gguf", ".safetensors")
# layers inside blocks that are small and that outputs depend on much: they keep their precision
_KEPT = re.compile(r"norm|modulation|_mod\b|emb|guidance")


def load_denoiser(
    name: str,
    *,
    dtype: torch.dtype,
    base_precision: str | None = None,
    file: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> dict[str, nn.Module]:
    """Loads the denoiser of a pipeline, of which only the Linear layers in its blocks may be quantised.

    Args:
        name: the pipeline's folder or hub name.
        dtype: of everything that is not quantised.
        base_precision: a key of `QUANTISED`; None for plain weights.
        file: a `.gguf` or `.safetensors` file with the denoiser's weights; its configuration is the
            pipeline's. None for the pipeline's own weights.

    Returns:
        The denoiser by the name of its component, as `from_pretrained` takes it.

    Raises:
        ValueError, ImportError, FileNotFoundError: they do not fit; the message has the remedy.
    """
    check_denoiser_options(base_precision, file)
    component, skeleton = denoiser_from_config(name, revision=revision)
    denoiser_class = type(skeleton)
    location = {"subfolder": component, "revision": revision}
    if file is not None:
        return {component: _from_file(denoiser_class, file, dtype, config=resolve(name), **location)}
    denoiser = denoiser_class.from_pretrained(
        resolve(name),
        variant=variant,
        dtype=dtype,
        use_safetensors=True,  # no pickled weights
        quantization_config=_quantization_config(base_precision, skeleton, dtype),
        **location,
    )
    return {component: denoiser}


def check_denoiser_options(base_precision: str | None, file: str | None) -> None:
    """Checks `--base_precision` and `--transformer` before anything is loaded.

    Args:
        base_precision: a key of `QUANTISED`; None for plain weights.
        file: the file with the denoiser's weights; None for the base's own.

    Raises:
        ValueError, ImportError, FileNotFoundError: they do not fit; the message has the remedy.
    """
    if file is not None:
        _check_file(file)
        if base_precision is not None:
            raise ValueError(
                f"--transformer {file} is used as it is stored: leave out --base_precision {base_precision}"
            )
    elif base_precision is not None:
        _check_quantiser(base_precision)


def _check_quantiser(base_precision: str) -> None:
    package = QUANTISED[base_precision]
    if find_spec(package) is None:
        raise ImportError(
            f"--base_precision {base_precision} needs {package}: pip install 'diffadapt[quant]'"
        )
    if package == "bitsandbytes" and not torch.cuda.is_available():
        raise ValueError(
            f"--base_precision {base_precision} needs a GPU, where alone diffusers quantises with {package}; "
            "int8 and fp8 work on a CPU too"
        )


def _check_file(file: str) -> None:
    if not file.endswith(FILE_SUFFIXES):
        raise ValueError(f"--transformer {file}: give a {' or '.join(FILE_SUFFIXES)} file")
    if not Path(file).is_file():
        raise FileNotFoundError(f"--transformer {file}: there is no such file")
    if file.endswith(".gguf") and find_spec("gguf") is None:
        raise ImportError(f"--transformer {file} needs gguf: pip install 'diffadapt[quant]'")


def plain_layers(denoiser: nn.Module) -> list[str]:
    """Names of the Linear layers that are not quantised: outside of blocks, of norms and of modulations."""
    lists = [name for name, module in denoiser.named_modules() if isinstance(module, nn.ModuleList)]
    names = []
    for name, layer in denoiser.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        is_in_block = any(name.startswith(f"{block_list}.") for block_list in lists)
        if not is_in_block or _KEPT.search(name):
            names.append(name)
    return names


def _quantization_config(base_precision: str, skeleton: nn.Module, dtype: torch.dtype) -> object:
    """diffusers' configuration of a quantiser, which leaves the plain layers of a denoiser as they are."""
    plain = plain_layers(skeleton)
    if base_precision == "nf4":
        return diffusers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=_skipped_by_bitsandbytes(skeleton, plain),
        )
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    config = Int8WeightOnlyConfig() if base_precision == "int8" else Float8WeightOnlyConfig()
    # names of parameters are compared as a whole, those of layers with parts of names too
    weights = [f"{name}.weight" for name in plain]
    return diffusers.TorchAoConfig(config, modules_to_not_convert=weights)


def _skipped_by_bitsandbytes(skeleton: nn.Module, plain: list[str]) -> list[str]:
    """The plain layers, without those that are named as the ends of others, such as FLUX's `proj_out`.

    diffusers would leave all layers of that name as they are, also large ones in blocks.
    """
    ends = set()
    for name, layer in skeleton.named_modules():
        if isinstance(layer, nn.Linear) and name not in plain:
            ends.add(name.rpartition(".")[2])
    return [name for name in plain if name not in ends]


def _from_file(
    denoiser_class: type[nn.Module], file: str, dtype: torch.dtype, **config_location: str | None
) -> nn.Module:
    if not hasattr(denoiser_class, "from_single_file"):
        raise ValueError(f"--transformer {file}: diffusers has no single files of {denoiser_class.__name__}")
    quantization = {}
    if file.endswith(".gguf"):
        quantization["quantization_config"] = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
    return denoiser_class.from_single_file(file, torch_dtype=dtype, **quantization, **config_location)
