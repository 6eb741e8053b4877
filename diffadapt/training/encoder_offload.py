"""Which models of a base the steps do not need, and which nothing needs any more.

Images and captions are encoded before the first step. After that the autoencoder is only needed to sample
images, and the text encoders of a base that samples from encoded captions are not needed at all.
"""

from torch import nn

from diffadapt.common.pipeline_components import AUTOENCODER
from diffadapt.data.batches import Batches
from diffadapt.formats.export import parse_formats
from diffadapt.models.base import BaseModel
from diffadapt.training.options import TrainOptions


def unused_components(model: BaseModel, batches: Batches) -> list[str]:
    """The names of the models that steps do not use, as everything they would encode is encoded."""
    needed_names = {model.denoiser_name}
    if not batches.are_images_encoded:
        needed_names.add(AUTOENCODER)
    if not batches.are_captions_encoded:
        needed_names |= model.text_encoders.keys()
    unused = []
    for name, component in model.pipe.components.items():
        if isinstance(component, nn.Module) and name not in needed_names:
            unused.append(name)
    return unused


def release_text_encoders(model: BaseModel, batches: Batches, options: TrainOptions) -> None:
    """Frees the text encoders where neither a step nor an image needs them any more."""
    if not model.samples_from_states or not batches.are_captions_encoded:
        return
    # A merged pipeline is written with them.
    is_merged_written = "merged" in parse_formats(options.export_formats)
    model.placement.release(model.text_encoders, keep=is_merged_written)
