"""The memory of each stage of a run, from shapes: no weights are loaded and nothing is computed.

For bases that sample from encoded captions, whose parts are on the device in turn (`models/placement.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from diffadapt.adapters.adapter import Adapter
from diffadapt.common.pipeline_components import AUTOENCODER
from diffadapt.models.base import BaseModel
from diffadapt.models.block_offload import outermost_blocks
from diffadapt.models.denoiser_loading import plain_layers
from diffadapt.training.optimizers import state_values
from diffadapt.training.options import TrainOptions
from diffadapt.training.peak_memory import peak_memory

META = torch.device("meta")
# nf4 has a scale of 4 bytes for 64 weights; one scale per row, of int8 and fp8, is negligible.
BYTES_PER_WEIGHT = {"int8": 1.0, "fp8": 1.0, "nf4": 0.5 + 4 / 64}


@dataclass(frozen=True)
class StageMemory:
    """Bytes on the device in one stage of a run.

    Attributes:
        name: of the stage.
        weights: of the models that are on the device, and of what is trained with its optimizer.
        activations: the most that is alive beside them at a time.
    """

    name: str
    weights: int
    activations: int

    @property
    def total(self) -> int:
        """The sum of both."""
        return self.weights + self.activations


def stage_memory(
    model: BaseModel, adapter: Adapter, options: TrainOptions, *, resolution: int, batch_size: int
) -> list[StageMemory]:
    """The stages of a run: encoding captions, encoding images, training, and sampling one image.

    Activations of text encoders, which are small beside their weights, are not counted.

    Args:
        model: a base whose models are all on the meta device.
        adapter: attached to its denoiser.
        options: of the optimizer and of memory.
        resolution: side of the images, in pixels.
        batch_size: images of a microstep.
    """
    text_weights = _bytes_of_modules(model.text_encoders.values())
    if options.text_encoder_device == "cpu":
        text_weights = 0
    autoencoder_weights = _bytes_of_modules([model.autoencoder])
    denoiser_weights = denoiser_bytes(
        model.denoiser, base_precision=options.base_precision, resident_blocks=options.offload_blocks
    )
    if options.transformer is not None:
        denoiser_weights = Path(options.transformer).stat().st_size  # as it is stored
    dequantised = dequantised_bytes(model.denoiser, options.base_precision)
    trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    # A trained value has beside itself a gradient, the optimizer's values and, with --use_ema, an average.
    copies = 2 + state_values(options) + bool(options.use_ema)
    adapter_bytes = _bytes(adapter.parameters()) + int((copies - 1) * _bytes(trained))
    weights = [*_tensors(model.pipe.components.values()), *adapter.parameters(), *adapter.buffers()]

    pixels = torch.empty(1, 3, resolution, resolution, device=META)
    images = _Images(model, pixels, weights)
    conditions = _conditions(model, batch_size)
    latents = torch.empty(batch_size, *images.latent_shape, device=META)
    training = _peak_of_step(model, latents, conditions, weights)
    sampling = _peak_of_prediction(model, torch.empty(1, *images.latent_shape, device=META), weights)
    return [
        StageMemory("encode captions", text_weights, 0),
        StageMemory("encode images", autoencoder_weights, images.encoding_peak),
        StageMemory("train", denoiser_weights + adapter_bytes, training + dequantised),
        StageMemory(
            "sample",
            denoiser_weights + adapter_bytes + autoencoder_weights,
            max(sampling + dequantised, images.decoding_peak),
        ),
    ]


def denoiser_bytes(
    denoiser: nn.Module, *, base_precision: str | None = None, resident_blocks: int | None = None
) -> int:
    """Bytes of a denoiser on the device.

    Args:
        denoiser: as shapes, not quantised.
        base_precision: a key of `BYTES_PER_WEIGHT`, in which its blocks' Linear layers would be held; others
            change nothing.
        resident_blocks: the number of blocks on the device; the largest ones are counted. None for all.
    """
    sizes = {}  # by the module that holds the tensors
    quantised = quantised_layers(denoiser) if base_precision in BYTES_PER_WEIGHT else set()
    for module in denoiser.modules():
        size = _bytes([*module.parameters(recurse=False), *module.buffers(recurse=False)])
        if module in quantised:
            weight = module.weight
            size -= int(weight.numel() * (weight.element_size() - BYTES_PER_WEIGHT[base_precision]))
        sizes[module] = size
    total = sum(sizes.values())
    if resident_blocks is None:
        return total
    blocks = [sum(sizes[module] for module in block.modules()) for block in outermost_blocks(denoiser)]
    return total - sum(sorted(blocks, reverse=True)[resident_blocks:])


def quantised_layers(denoiser: nn.Module) -> set[nn.Linear]:
    """The layers that `--base_precision` quantises."""
    plain = set(plain_layers(denoiser))
    layers = set()
    for name, layer in denoiser.named_modules():
        if isinstance(layer, nn.Linear) and name not in plain:
            layers.add(layer)
    return layers


def dequantised_bytes(denoiser: nn.Module, base_precision: str | None) -> int:
    """Bytes of the largest weight that is dequantised for a moment."""
    if base_precision not in BYTES_PER_WEIGHT:
        return 0
    return max(layer.weight.numel() * layer.weight.element_size() for layer in quantised_layers(denoiser))


class _Images:
    """What the autoencoder needs for one image.

    Attributes:
        encoding_peak, decoding_peak: bytes beside its weights.
        latent_shape: (C, h, w), as the denoiser takes it.
    """

    def __init__(self, model: BaseModel, pixels: Tensor, weights: Sequence[Tensor]):
        vae = getattr(model.pipe, AUTOENCODER)
        encode = vae.encode
        outputs = []

        def remember(images: Tensor, *arguments: object, **options: object) -> object:
            outputs.append(encode(images, *arguments, **options))
            return outputs[-1]

        vae.encode = remember  # its own latents, before the family brings them to the denoiser's form
        try:
            with peak_memory(weights) as memory, torch.no_grad():
                encoded = model.encode_images(pixels)
        finally:
            del vae.encode
        self.encoding_peak = memory.peak
        noise = None
        if model.is_stochastic:
            noise = encoded.new_empty(1, encoded.shape[1] // 2, *encoded.shape[2:])
        self.latent_shape = model.sample_latents(encoded, noise).shape[1:]
        latents = outputs[0].latent_dist.mode()
        with peak_memory([*weights, latents]) as memory, torch.no_grad():
            vae.decode(latents, return_dict=False)
        self.decoding_peak = memory.peak


def _conditions(model: BaseModel, batch_size: int) -> dict[str, Tensor]:
    """Conditions of captions of the greatest length, in the precision of the denoiser."""
    conditions = {}
    for name, shape in model.longest_conditions().items():
        conditions[name] = torch.empty(batch_size, *shape, dtype=model.denoiser.dtype, device=META)
    return conditions


def _peak_of_step(
    model: BaseModel, latents: Tensor, conditions: dict[str, Tensor], weights: Sequence[Tensor]
) -> int:
    """Bytes beside the weights in a forward and backward pass; gradients are counted with the weights."""
    timesteps = torch.empty(len(latents), device=META)
    gradients = _bytes(weight for weight in weights if weight.requires_grad)
    with peak_memory(weights) as memory:
        predicted = model.predict(model.denoiser, latents, timesteps, conditions)
        predicted.float().square().mean().backward()
    for weight in weights:
        weight.grad = None
    return max(0, memory.peak - gradients)


@torch.no_grad()
def _peak_of_prediction(model: BaseModel, latents: Tensor, weights: Sequence[Tensor]) -> int:
    """Bytes beside the weights in a step of sampling one image with guidance: two predictions at once."""
    latents = latents.expand(2, *latents.shape[1:])
    timesteps = torch.empty(2, device=META)
    with peak_memory(weights) as memory:
        model.predict(model.denoiser, latents, timesteps, _conditions(model, 2))
    return memory.peak


def _tensors(components: Iterable[object]) -> list[Tensor]:
    tensors = []
    for component in components:
        if isinstance(component, nn.Module):
            tensors += [*component.parameters(), *component.buffers()]
    return tensors


def _bytes_of_modules(modules: Iterable[nn.Module]) -> int:
    return _bytes(_tensors(modules))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
