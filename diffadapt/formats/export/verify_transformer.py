"""Files for transformers with the names of diffusers, read back as ComfyUI and as diffusers read them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

import torch
from safetensors.torch import load_file

from diffadapt.adapters.architectures import Architecture
from diffadapt.formats.emulators import Refused
from diffadapt.formats.emulators.comfyui_transformers import comfyui_program
from diffadapt.formats.emulators.peft import DIFFUSERS, open_transformer_file
from diffadapt.formats.export.exported_layer import ExportedLayer
from diffadapt.formats.export.layer_names import kohya_name
from diffadapt.formats.export.verify import Verdict, by_layer, read_by_programs


def verify_transformer(
    path: str,
    layers: Sequence[ExportedLayer],
    base: Architecture,
    dtype: torch.dtype,
    loader_refusal: str,
) -> list[Verdict]:
    """The verdicts of ComfyUI and of stock diffusers.

    Args:
        layers: what the file was written from.
        base: architecture of the base.
        dtype: precision of the file.
        loader_refusal: why diffusers opens no file of this base; empty where it does.
    """
    tensors = load_file(path)
    names = [kohya_name(layer.component, layer.path, base) for layer in layers]
    file_keys = by_layer(tensors, _split_at(names))
    programs = [comfyui_program(base)]
    refusal = loader_refusal
    if not refusal:
        try:
            programs.append(open_transformer_file(tensors, base.name))
        except Refused as error:
            refusal = str(error)
    finds_layer = dict.fromkeys(programs, lambda layer: True)  # they look up names themselves
    verdicts = read_by_programs(finds_layer, file_keys, layers, names, dtype)
    if refusal:
        verdicts.append(Verdict(DIFFUSERS.name, DIFFUSERS.version, "refused", reason=refusal))
    return verdicts


def _split_at(names: Collection[str]) -> Callable[[str], tuple[str, str]]:
    """A function that splits keys into the name of a layer and the rest."""
    known = set(names)

    def split(key: str) -> tuple[str, str]:
        for dot in re.finditer(r"\.", key):
            if key[: dot.start()] in known:
                return key[: dot.start()], key[dot.end() :]
        return key, ""

    return split
