"""The contract of a base model: everything training, sampling, caches and files need to know of a family.

A family is one module with a subclass of `BaseModel`, and one line in `diffadapt.models.families`. Subclasses
of `TextConditionedBase` and `ClassConditionedBase` inherit most of the contract.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from diffadapt.adapters.architectures import Architecture
from diffadapt.common.pipeline_components import (
    AUTOENCODER,
    DENOISERS,
    text_encoder_names,
    tokenizer_names,
)
from diffadapt.models.caption_limits import CaptionLimit, TruncatedCaption, truncated_captions
from diffadapt.models.noise_schedule import TimestepSampling
from diffadapt.models.placement import Placement

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffadapt.common.images import CropGeometry
    from diffadapt.models.noise_schedule import NoiseSchedule
    from diffadapt.models.sampling import ImageRequest, SamplingConfig

BASE_SAMPLING = TimestepSampling()  # all as the base has it
FLOW_OPTIONS_ONLY = "this base was trained on a schedule of betas, whose timesteps are uniform"
# Options of flow matching, and why a base with a schedule of betas does not take them.
INAPPLICABLE_TO_BETAS = {"timestep_density": FLOW_OPTIONS_ONLY, "timestep_shift": FLOW_OPTIONS_ONLY}


@dataclass(frozen=True)
class BaseProfile:
    """Option values and prompts that suit a family, or one embedded base of it.

    Attributes:
        name: of the family, or of the embedded base.
        defaults: option -> value where none is given. Every profile has targets, train_batch_size,
            max_train_steps, lr_scheduler, preferred_precision, center_crop, num_validation_images,
            num_inference_steps, guidance_scale, sample_batch_size and extractor.
        tuned_methods: method -> the `rank` and `learning_rate` that were tried on this base; other methods
            bring their own.
        context_prompts: a subject where training never put it; `{}` is the subject, as in "sks dog".
        unrelated_prompts: have nothing to do with a subject; images of them should not change.
        inapplicable_options: training option -> why it cannot have an effect on this base.
    """

    name: str
    defaults: Mapping[str, object]
    tuned_methods: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    context_prompts: tuple[str, ...] = ()
    unrelated_prompts: tuple[str, ...] = ()
    inapplicable_options: Mapping[str, str] = field(default_factory=lambda: INAPPLICABLE_TO_BETAS)


class BaseModel(ABC):
    """A loaded base.

    A subclass sets the class attributes and implements the abstract methods; the other methods fit pipelines
    in diffusers' usual layout.

    Class attributes:
        family: name of the family in messages and as a key, e.g. "sdxl".
        pipeline_classes: classes in model_index.json that belong to the family.
        profile_of_family: what suits a base of this family.
        embedded_profiles: what suits an embedded base of this family, by its name.
        optional_components: components that a pipeline of this family may lack.
        left_out_where_absent: those of them that `from_pretrained` must be told to leave out of a pipeline
            whose index does not name them.
        without_safety_checker: arguments of `from_pretrained` that leave a safety checker out.
        samples_from_states: whether images can be sampled from conditions of `encode_captions`, so that the
            text encoders are not needed once all captions are encoded.

    Attributes:
        pipe: the diffusers pipeline with every component.
        source: as named by the user: a folder, a hub name, a file or embedded:NAME.
        profile: what suits this base.
        train_text_encoder: whether text encoders are trained, so that captions stay token ids.
        placement: which components are on the device that computes.
    """

    family: ClassVar[str]
    pipeline_classes: ClassVar[tuple[str, ...]]
    profile_of_family: ClassVar[BaseProfile]
    embedded_profiles: ClassVar[Mapping[str, BaseProfile]] = {}
    optional_components: ClassVar[frozenset[str]] = frozenset(
        ("safety_checker", "feature_extractor", "image_encoder")
    )
    left_out_where_absent: ClassVar[tuple[str, ...]] = ()
    without_safety_checker: ClassVar[Mapping[str, object]] = {}
    samples_from_states: ClassVar[bool] = False

    def __init__(self, pipe: DiffusionPipeline, source: str, profile: BaseProfile):
        self.pipe = pipe
        self.source = source
        self.profile = profile
        self.train_text_encoder = False
        self.placement = Placement(pipe)

    @classmethod
    def pipeline_type(cls, class_name: str) -> type[DiffusionPipeline]:
        """The class that opens a folder whose index names `class_name`."""
        from diffusers import DiffusionPipeline

        return DiffusionPipeline  # finds the class by its name

    @classmethod
    def describe_architecture(
        cls, denoiser: nn.Module, components: Mapping[str, nn.Module]
    ) -> Architecture | None:
        """Facts about the layers, for attaching and for files of other programs.

        Args:
            denoiser: of any family.
            components: the models beside it that can be adapted, by component name.

        Returns:
            None for a denoiser of another family, or one about which nothing is particular.
        """
        return None

    # Components. What is not in diffusers' usual layout is a property to override.

    @property
    def denoiser_name(self) -> str:
        """The component that is trained, e.g. "unet"."""
        present = [name for name in DENOISERS if getattr(self.pipe, name, None) is not None]
        return present[0]

    @property
    def denoiser(self) -> nn.Module:
        """The network that predicts noise, velocity or sample."""
        return getattr(self.pipe, self.denoiser_name)

    @property
    def has_weights(self) -> bool:
        """Whether the denoiser has weights, and not only shapes on the meta device."""
        return not next(self.denoiser.parameters()).is_meta

    @property
    def autoencoder(self) -> nn.Module | None:
        """Between pixels and latents; None for a base in pixel space."""
        return getattr(self.pipe, AUTOENCODER, None)

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """Text encoders by component name, in order; without those that this base lacks."""
        return self._present(text_encoder_names(self.pipe))

    @property
    def tokenizers(self) -> dict[str, Any]:
        """Tokenizers by component name, in the order of their text encoders."""
        return self._present(tokenizer_names(self.pipe))

    def _present(self, names: Sequence[str]) -> dict[str, Any]:
        components = {name: getattr(self.pipe, name) for name in names}
        return {name: component for name, component in components.items() if component is not None}

    # Images

    @property
    @abstractmethod
    def resolution(self) -> int:
        """The side, in pixels, of the images the base was trained on."""

    @property
    def size_multiple(self) -> int:
        """The sides of training images are multiples of this, in pixels, where images differ in size.

        Raises:
            ValueError: the denoiser is made for one size only.
        """
        config = self.denoiser.config
        if "block_out_channels" not in config:
            raise ValueError("--aspect_ratio_buckets needs a UNet; this base is made for one size of images")
        levels = len(config.block_out_channels)  # each halves the side of the one before
        return self._pixels_per_position() * 2 ** (levels - 1)

    @property
    def square_limits(self) -> tuple[int, int]:
        """The step and the smallest side, in pixels, of square training images.

        Attention over one position has no gradient of queries and keys, so every level has at least two a
        side.
        """
        config = self.denoiser.config
        pixels = self._pixels_per_position()
        if "block_out_channels" not in config:
            step = pixels * config.get("patch_size", 1)
            return step, 2 * step
        reduction = 2 ** (len(config.block_out_channels) - 1)
        takes_odd_sizes = "cross_attention_dim" in config
        step = pixels if takes_odd_sizes else pixels * reduction
        smallest = pixels * (reduction + 1)
        return step, -(-smallest // step) * step  # rounded up to a multiple

    def _pixels_per_position(self) -> int:
        """Pixels of the image per position of the denoiser's input, along one side."""
        return self.resolution // self.denoiser.config.sample_size

    @property
    @abstractmethod
    def is_stochastic(self) -> bool:
        """Whether `encode_images` gives a distribution to sample latents from."""

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encodes images once; the result is cached.

        Args:
            pixels: (B, 3, H, W) in [-1, 1].

        Returns:
            (B, 2C, h, w), mean and log-variance of a stochastic base; else (B, C, h, w).
        """

    @abstractmethod
    def sample_latents(self, encoded: Tensor, noise: Tensor | None) -> Tensor:
        """Latents (B, C, h, w) at the denoiser's scale.

        Args:
            encoded: of `encode_images`.
            noise: (B, C, h, w), standard normal, of a stochastic base; else None.
        """

    def size_conditions(self, crops: Sequence[CropGeometry]) -> dict[str, Tensor]:
        """Conditions, each (B, ...), that follow from the original size and the crop of each image."""
        return {}

    # Captions and classes. Conditions are tensors by name, as `predict` takes them.

    @property
    @abstractmethod
    def empty_caption(self) -> str | int:
        """The caption or class that a dropped one becomes."""

    @abstractmethod
    def encode_captions(self, captions: Sequence[str] | Sequence[int]) -> dict[str, Tensor]:
        """Conditions of captions or classes, each (B, ...), in the precision in which they are cached."""

    def longest_conditions(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the conditions of the longest caption, without the batch, where `samples_from_states`.

        They are known without weights, for counting memory.
        """
        raise NotImplementedError(f"{self.family} encodes captions to find out")

    def collate_conditions(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """One batch of conditions from those of single captions, each (...) without the batch.

        A family whose captions differ in length pads them here, and adds the mask.
        """
        conditions = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            conditions[name] = torch.stack(values)  # (B, ...)
        return conditions

    def caption_settings(self) -> dict[str, object]:
        """Settings besides text encoders and tokenizers that `encode_captions` follows from.

        They are part of the key under which conditions are cached on disk, so values must be JSON.
        """
        name = "force_zeros_for_empty_prompt"
        return {name: self.pipe.config.get(name)}

    @classmethod
    def caption_limits(cls, pipe: DiffusionPipeline) -> list[CaptionLimit]:
        """How long a caption may be, for each tokenizer whose limit counts."""
        return []

    def truncated_captions(self, captions: Sequence[str]) -> list[TruncatedCaption]:
        """The distinct captions of which the end is not read, and what is lost of each."""
        return truncated_captions(self.caption_limits(self.pipe), captions)

    @abstractmethod
    def enable_text_encoder_training(self) -> None:
        """Lets `predict` encode captions in every step, so that gradients reach the text encoders.

        Raises:
            ValueError: the text encoders of this base cannot be trained; the message says why.
        """

    # Prediction and objective

    @abstractmethod
    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """The denoiser's prediction (B, C, h, w), comparable with the target of `training_schedule`.

        Args:
            denoiser: the one of the pipeline, perhaps wrapped for several processes.
            noisy: (B, C, h, w) latents; a family that packs them into tokens does it here.
            timesteps: (B,) of the training schedule.
            conditions: of `collate_conditions` and `size_conditions`.
        """

    def training_schedule(self, sampling: TimestepSampling = BASE_SAMPLING) -> NoiseSchedule:
        """The noise the base was trained with, whatever sampler it is shipped with.

        Args:
            sampling: of the times of a flow-matching base.

        Raises:
            ValueError: the sampler has no such schedule behind it.
        """
        from diffadapt.models.beta_schedule import beta_schedule  # imports diffusers, which takes seconds

        return beta_schedule(self.pipe.scheduler, self.source)

    @property
    def undistilled_base(self) -> str | None:
        """The base to train in place of this one, if this one was distilled to need few steps."""
        return None

    # Sampling: class methods, since `diffadapt sample` has a pipeline only

    @classmethod
    def sampling_size_multiple(cls, pipe: DiffusionPipeline) -> int:
        """The sides of generated images are multiples of this, in pixels; 1 where the pipeline checks it."""
        return 1

    @classmethod
    @abstractmethod
    def pipeline_arguments(
        cls, requests: Sequence[ImageRequest], config: SamplingConfig
    ) -> dict[str, object]:
        """Arguments of the pipeline's call: what to draw, its size, and how guidance is said."""

    @classmethod
    def negative_caption(cls, config: SamplingConfig) -> str | None:
        """The caption that guidance leads away from; None where the pipeline reads no second caption."""
        return config.negative_prompt or ""

    @classmethod
    def embedding_arguments(
        cls, positive: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None
    ) -> dict[str, object]:
        """Arguments of the pipeline's call in place of prompts, where `samples_from_states`.

        Args:
            positive: conditions of the prompts, of `collate_conditions`.
            negative: of `negative_caption`, as often as there are prompts; None where there is none.
        """
        raise NotImplementedError(f"{cls.family} samples from prompts only")

    @classmethod
    @abstractmethod
    def decode_output(cls, pipe: DiffusionPipeline, output: Any, config: SamplingConfig) -> Tensor:
        """Images (B, 3, H, W), float32 in [0, 1], from the `images` that the pipeline's call returns."""
