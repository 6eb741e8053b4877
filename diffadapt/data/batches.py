"""Batches of the training data: latents, noise, timesteps and conditions at given positions of the data.

A sample of a batch is a function of (seed, epoch, sample) alone. So the same batches come out after a resume,
on any number of processes, and with or without cached latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from diffadapt.common.images import CropGeometry, ImageSource, check_images
from diffadapt.common.keyed_random import normal, uniform
from diffadapt.common.messages import indented_list
from diffadapt.common.pipeline_components import AUTOENCODER
from diffadapt.data.buckets import BucketOrder, Buckets, Size
from diffadapt.data.cache import open_cache
from diffadapt.data.encoding import (
    RECENT_CAPTIONS,
    Crop,
    EncodedCaptions,
    EncodedImages,
    UnreadableImage,
)
from diffadapt.data.examples import Example, OrderedExamples, SampleIndex, ShuffledOrder
from diffadapt.data.scaled_images import IMAGE_MEMORY
from diffadapt.data.stream import Stream
from diffadapt.data.summary import DataSummary, describe, size_notes
from diffadapt.data.trigger_words import add_trigger_word
from diffadapt.models.base import BASE_SAMPLING, BaseModel
from diffadapt.models.caption_limits import TruncatedCaption
from diffadapt.models.noise_schedule import TimestepSampling

MAX_UNREADABLE = 100  # unreadable images in a row that streaming skips
CENTER = (0.5, 0.5)


@dataclass(frozen=True)
class Batch:
    """The data of one forward pass. With prior preservation the class examples are its second half.

    Attributes:
        latents: (B, C, h, w)
        noise: (B, C, h, w)
        timesteps: (B,), of the training schedule
        conditions: the inputs of the denoiser besides latents and timesteps, each (B, ...).
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    conditions: dict[str, Tensor]

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        return Batch(
            latents=self.latents.to(device),
            noise=self.noise.to(device),
            timesteps=self.timesteps.to(device),
            conditions={name: value.to(device) for name, value in self.conditions.items()},
        )


class Batches:
    """Encodes examples (moments of the autoencoder, text states) and makes batches of them.

    Args:
        model: the base.
        examples: the examples to train on.
        classes: the class examples of prior preservation.
        resolution: the side of the square crop of an image, in pixels.
        center_crop: crop the center, not a random position.
        seed: the seed of the run.
        random_flip: mirror half of the samples, at random.
        trigger_word: a word to put before every caption that does not contain it.
        caption_dropout: the share of samples that get the base's empty caption (or null class).
        noise_offset: the standard deviation of a constant that is added to each channel of the noise.
        timestep_sampling: how the noise levels of a flow-matching base are sampled.
        cache_latents: "memory", "disk" or "none"; None for memory where possible.
        cache_dir: the folder of a cache on disk.
        buckets: sizes to use in place of the square, with center crops.
        is_streaming: neither check nor encode images before the first step; skip unreadable ones.
        is_dry_run: encode nothing beforehand and cache nothing, to describe a run without starting it.
        prompts: more captions to encode, those of images that the run will sample.
        encoded_captions: encoded captions of other batches of the same base, to use and to add to.

    Raises:
        ValueError: options exclude each other, or images cannot be read or have no caption.
    """

    def __init__(
        self,
        model: BaseModel,
        examples: Sequence[Example] | Stream,
        *,
        classes: Sequence[Example] = (),
        resolution: int,
        center_crop: bool,
        seed: int,
        random_flip: bool = False,
        trigger_word: str | None = None,
        caption_dropout: float = 0.0,
        noise_offset: float = 0.0,
        timestep_sampling: TimestepSampling = BASE_SAMPLING,
        cache_latents: str | None = None,
        cache_dir: str | None = None,
        buckets: Buckets | None = None,
        is_streaming: bool = False,
        is_dry_run: bool = False,
        prompts: Sequence[str] = (),
        encoded_captions: EncodedCaptions | None = None,
    ):
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"--caption_dropout is a share between 0 and 1, got {caption_dropout}")
        if trigger_word is not None and not trigger_word.strip():
            raise ValueError(f"--trigger_word is blank, got {trigger_word!r}; give a word, or leave it out")
        self.model = model
        self.seed = seed
        self.resolution = resolution
        self.random_flip = random_flip
        self.trigger_word = trigger_word
        self.caption_dropout = caption_dropout
        self.noise_offset = noise_offset
        self.is_streaming = is_streaming or isinstance(examples, Stream)
        self.schedule = model.training_schedule(timestep_sampling)
        self.bucket_of: dict[ImageSource, Size] = {}

        sizes: list[tuple[int, int]] = []
        if not self.is_streaming:
            examples = list(examples)  # one object per example: repeated images are recognized by identity
            sizes = _image_sizes([*examples, *classes])
        self.order = self._make_order(examples, classes, buckets, sizes)
        # after the order, which assigns images to buckets
        self.size_notes = self._size_notes([*examples, *classes], sizes) if sizes else []
        all_are_square = bool(sizes) and all(width == height for width, height in sizes)
        # A square image has only one crop, and buckets crop the center.
        self.center_crop = center_crop or all_are_square or buckets is not None

        self.cache = open_cache(self._cache_kind(cache_latents), cache_dir)
        cache = None if is_dry_run else self.cache
        image_memory = 0 if self.is_streaming else IMAGE_MEMORY
        recent = RECENT_CAPTIONS if self.is_streaming else None
        self.encoded_images = EncodedImages(model, cache, image_memory=image_memory)
        self.encoded_captions = encoded_captions or EncodedCaptions(model, cache, recent=recent)
        self.truncated_captions: list[TruncatedCaption] = []
        # Whether steps need no autoencoder and no text encoder, as everything is encoded beforehand.
        is_encoded_beforehand = not self.is_streaming and not is_dry_run
        self.are_images_encoded = is_encoded_beforehand and self.cache is not None
        self.are_captions_encoded = is_encoded_beforehand and not model.train_text_encoder
        if not self.is_streaming:
            self._prepare([*examples, *classes], prompts, encode=not is_dry_run)

    @property
    def description(self) -> str:
        """A summary of the data for the user, on one or several lines."""
        return describe(
            DataSummary(
                order=self.order,
                resolution=self.resolution,
                bucket_of=self.bucket_of,
                cache=self.cache,
                center_crop=self.center_crop,
                random_flip=self.random_flip,
                caption_dropout=self.caption_dropout,
                trigger_word=self.trigger_word,
                size_notes=self.size_notes,
                truncated_captions=self.truncated_captions,
            )
        )

    def batch(self, positions: Sequence[int]) -> Batch:
        """The samples at these positions of the endless stream of samples."""
        samples = self.order.sample_indices(positions)
        captions = []
        encodings = []
        geometries = []
        for sample in samples:
            example, encoded, geometry = self._load(sample)
            captions.append(self._caption(sample, example))
            encodings.append(encoded)
            geometries.append(geometry)
        if self.is_streaming and not self.truncated_captions:
            self._notify_truncated(captions)
        # The autoencoder's posterior is sampled anew for every use: latents = scale (mean + std noise).
        encoded = torch.stack(encodings)  # (B, 2 C, h, w) moments, or (B, C, h, w) latents
        posterior_noise = None
        if self.model.is_stochastic:
            posterior_shape = (encoded.shape[1] // 2, *encoded.shape[2:])
            posterior_noise = self._normal("posterior", samples, posterior_shape)
        latents = self.model.sample_latents(encoded, posterior_noise)
        # the key names sample and purpose, so that no number depends on the batch it is used in
        timestep_keys = [self._key("timestep", sample) for sample in samples]
        conditions = self.encoded_captions.rows(captions)
        conditions |= self.model.size_conditions(geometries)
        return Batch(
            latents=latents,
            noise=self._noise(samples, latents.shape[1:]),
            timesteps=self.schedule.sample_timesteps(timestep_keys, latents),
            conditions=conditions,
        )

    def read_ahead(self, positions: Sequence[int]) -> None:
        """Starts to read the images of these positions in the background, which changes no batch."""
        crops = []
        for sample in self.order.sample_indices(positions):
            example = self.order.example(sample)
            crops.append((example.source, self._crop(sample, example)))
        self.encoded_images.read_ahead(crops)

    def examples(self, positions: Sequence[int]) -> list[Example]:
        """The examples of the samples at these positions."""
        samples = self.order.sample_indices(positions)
        if not self.is_streaming:
            return [self.order.example(sample) for sample in samples]
        return [self._load(sample)[0] for sample in samples]  # another one where one cannot be read

    def names(self, positions: Sequence[int]) -> list[str]:
        """The files of the samples at these positions, for messages."""
        return [str(example.source) for example in self.examples(positions)]

    def _load(self, sample: SampleIndex) -> tuple[Example, Tensor, CropGeometry]:
        """The example of a sample, its encoded image and the geometry of its crop.

        Streaming substitutes the next example for one that cannot be read or has no caption. Random numbers
        stay those of the original sample.
        """
        candidate = sample
        for _ in range(MAX_UNREADABLE):
            example = self.order.example(candidate)
            try:
                if example.caption == "":
                    raise UnreadableImage(f"{example.source} has no caption")
                encoded, geometry = self.encoded_images.get(example.source, self._crop(sample, example))
            except UnreadableImage as error:
                if not self.is_streaming:
                    raise
                tqdm.write(f"left out: {error}")
                candidate = self.order.substitute(candidate)
            else:
                return example, encoded, geometry
        raise ValueError(f"{MAX_UNREADABLE} images in a row cannot be read")

    def _crop(self, sample: SampleIndex, example: Example) -> Crop:
        size = self._crop_size(example)
        position = CENTER
        if not self.center_crop:
            position = tuple(uniform(self._key("crop", sample), 2))  # along (width, height), from 0 to 1
        flip = self.random_flip and uniform(self._key("flip", sample), 1)[0] < 0.5
        return Crop(size, position, flip)

    def _crop_size(self, example: Example) -> Size:
        return self.bucket_of.get(example.source, (self.resolution, self.resolution))

    def _caption(self, sample: SampleIndex, example: Example) -> str | int:
        """The caption with the trigger word, or the empty one if it is dropped."""
        if self.caption_dropout and uniform(self._key("dropped", sample), 1)[0] < self.caption_dropout:
            return self.model.empty_caption
        return add_trigger_word(example.caption, self.trigger_word)

    def _key(self, purpose: str, sample: SampleIndex) -> tuple[str | int, ...]:
        """The key of the random numbers that a sample needs for a purpose."""
        return (purpose, self.seed, sample.role, sample.epoch, sample.sample)

    def _noise(self, samples: Sequence[SampleIndex], shape: Sequence[int]) -> Tensor:
        """(B, *shape)"""
        noise = self._normal("noise", samples, shape)
        # Offset noise: one value per channel (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
        if self.noise_offset:
            noise = noise + self.noise_offset * self._normal("noise_offset", samples, (shape[0], 1, 1))
        return noise

    def _normal(self, purpose: str, samples: Sequence[SampleIndex], shape: Sequence[int]) -> Tensor:
        """(B, *shape), standard normal, keyed by the sample."""
        return torch.stack([normal(self._key(purpose, sample), shape) for sample in samples])

    def _make_order(
        self,
        examples: Sequence[Example] | Stream,
        classes: Sequence[Example],
        buckets: Buckets | None,
        sizes: Sequence[tuple[int, int]],
    ) -> OrderedExamples | Stream:
        """The examples in the order of the run; assigns images to buckets.

        Args:
            examples: the examples to train on.
            classes: the class examples.
            buckets: the buckets, or None.
            sizes: (width, height) of the image of each example.
        """
        if isinstance(examples, Stream):
            return examples
        if not examples:
            raise ValueError("there are no images to train on")
        if buckets is None:
            order = ShuffledOrder(len(examples), len(classes), self.seed)
            return OrderedExamples(examples, classes, order)
        if self.is_streaming or classes:
            other = "--streaming" if self.is_streaming else "class images"
            raise ValueError(f"aspect-ratio buckets and {other} do not go together")
        members: dict[Size, list[int]] = {}  # bucket -> indices of its examples
        for index, (example, image_size) in enumerate(zip(examples, sizes, strict=True)):
            bucket = buckets.nearest(image_size)
            self.bucket_of[example.source] = bucket
            members.setdefault(bucket, []).append(index)
        # Sorted, so that the order does not depend on which size occurs first.
        sorted_members = [members[size] for size in sorted(members)]
        return OrderedExamples(examples, (), BucketOrder(sorted_members, buckets.group, self.seed))

    def _size_notes(self, examples: Sequence[Example], sizes: Sequence[tuple[int, int]]) -> list[str]:
        """Notes about much enlarged and much cropped images, each image counted once."""
        size_of: dict[ImageSource, tuple[int, int]] = {}
        crop_size_of: dict[ImageSource, Size] = {}
        for example, size in zip(examples, sizes, strict=True):
            size_of[example.source] = size
            crop_size_of[example.source] = self._crop_size(example)
        return size_notes(list(size_of), list(size_of.values()), list(crop_size_of.values()))

    def _cache_kind(self, requested: str | None) -> str:
        """The kind of cache to open, for the value of `--cache_latents`."""
        if requested is None:
            return "memory" if self.center_crop and not self.is_streaming else "none"
        if requested == "memory" and self.is_streaming:
            raise ValueError("--streaming is for sets larger than memory: --cache_latents disk or none")
        if requested != "none" and not self.center_crop:
            raise ValueError(
                f"--cache_latents {requested} needs images that are always cropped alike: add --center_crop "
                "or --aspect_ratio_buckets"
            )
        return requested

    def _notify_truncated(self, captions: Sequence[str | int]) -> None:
        """Reports the first caption of a stream that is too long; streams are not checked beforehand."""
        if any(isinstance(caption, str) for caption in captions):
            self.truncated_captions = self.model.truncated_captions(captions)
        for caption in self.truncated_captions[:1]:
            tqdm.write(
                f"too long for the tokenizer, so not read: {caption.lost!r} of {caption.caption!r} "
                f"({caption.length} tokens); later captions are truncated without notice"
            )

    def _prepare(self, examples: Sequence[Example], prompts: Sequence[str], *, encode: bool) -> None:
        """Checks the captions and encodes everything once, so that a fault shows before the first step."""
        captions = []
        missing = []
        for example in examples:
            captions.append(add_trigger_word(example.caption, self.trigger_word))
            if example.caption == "":
                missing.append(example.source)
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(examples)} images have no caption:\n{indented_list(missing)}"
            )
        if any(isinstance(caption, str) for caption in captions):
            self.truncated_captions = self.model.truncated_captions(captions)
        if not encode:
            return
        placement = self.model.placement
        if self.caption_dropout:
            captions.append(self.model.empty_caption)
        with placement.on_device(self.model.text_encoders):
            self.encoded_captions.prepare([*captions, *prompts])
        if self.cache is not None:
            with placement.on_device([AUTOENCODER]):
                self.encoded_images.prepare(self._crops_to_encode(examples))

    def _crops_to_encode(self, examples: Sequence[Example]) -> list[tuple[ImageSource, Crop]]:
        """The crops of all images; both variants, as mirrored pixels do not give mirrored latents."""
        crops = []
        for example in examples:
            flips = (False, True) if self.random_flip else (False,)
            for flip in flips:
                crops.append((example.source, Crop(self._crop_size(example), CENTER, flip)))
        return crops


def _image_sizes(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """(width, height) of each example's image; a repeated image is read once."""
    sources = {id(example.source): example.source for example in examples}
    sizes = dict(zip(sources, check_images(list(sources.values())), strict=True))
    return [sizes[id(example.source)] for example in examples]
