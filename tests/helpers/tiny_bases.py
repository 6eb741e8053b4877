"""A saved tiny base of any family that reads captions, by name."""

from pathlib import Path

import pytest
from helpers.family_pipelines import FAMILIES, tiny_folder
from helpers.pipelines import tiny_sd_pipeline, tiny_sdxl_pipeline

_UNET_BASES = {"sd": tiny_sd_pipeline, "sdxl": tiny_sdxl_pipeline}
BASES = (*_UNET_BASES, *FAMILIES)
SIDE = 32  # pixels; every base here can be trained on images of this size


def tiny_base(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a base, written once in a session; read it, do not write to it.

    Args:
        name: One of `BASES`.
    """
    if name in FAMILIES:
        return tiny_folder(name, tmp_path_factory)
    folder = tmp_path_factory.getbasetemp() / "families" / name
    return folder if folder.exists() else _UNET_BASES[name](folder, vae="kl")
