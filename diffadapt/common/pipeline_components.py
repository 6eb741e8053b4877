"""Names of a diffusers pipeline's components, by what the components do.

Diffusers numbers the components of one kind: `text_encoder`, `text_encoder_2`, `text_encoder_3`. Nothing else
in the package spells these names out or counts them, so one text encoder more is no special case.
"""

from __future__ import annotations

import re
from itertools import count

DENOISERS = ("unet", "transformer")
AUTOENCODER = "vae"
PROCESSOR = "processor"  # holds the tokenizer of some language models that read images too

_TEXT_ENCODER = re.compile(r"text_encoder(_\d+)?")


def is_text_encoder(component: str) -> bool:
    """Whether a component of that name is a text encoder."""
    return _TEXT_ENCODER.fullmatch(component) is not None


def is_in_text_encoder(path: str) -> bool:
    """Whether a dotted path, such as `text_encoder_2.layers.0`, begins with a text encoder."""
    return is_text_encoder(path.partition(".")[0])


def without_denoiser(path: str) -> str:
    """A layer's path without the denoiser's name: the same in a pipeline and in its bare denoiser."""
    component, _, inner = path.partition(".")
    return inner if component in DENOISERS and inner else path


def text_encoder_names(pipeline: object) -> list[str]:
    """The names of a pipeline's text encoders, in order; one that is None in this pipeline counts too."""
    return _numbered(pipeline, "text_encoder")


def tokenizer_names(pipeline: object) -> list[str]:
    """The names of a pipeline's tokenizers, in order."""
    return _numbered(pipeline, "tokenizer")


def _numbered(pipeline: object, kind: str) -> list[str]:
    """`kind`, `kind_2`, `kind_3` ... as far as the pipeline has attributes of these names."""
    names = [kind] if hasattr(pipeline, kind) else []
    for number in count(2):
        name = f"{kind}_{number}"
        if not hasattr(pipeline, name):
            break
        names.append(name)
    return names
