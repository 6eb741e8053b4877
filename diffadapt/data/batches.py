"""Batches by position: latents, noise, timesteps and conditions of any stretch of the stream of samples.

Everything in a batch is a function of (seed, epoch, sample): the same batch comes out after a resume, in any
number of processes, and whether or not latents are cached.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from diffadapt.common.images import CropGeometry, ImageSource, check_images
from diffadapt.common.keyed_random import normal, uniform
from diffadapt.common.messages import indented_list
from diffadapt.data.buckets import BucketOrder, Buckets, Size
from diffadapt.data.cache import open_cache
from diffadapt.data.encoding import RECENT, Crop, EncodedCaptions, EncodedImages, UnreadableImage
from diffadapt.data.examples import Example, OrderedExamples, SampleIndex, ShuffledOrder
from diffadapt.data.scaled_images import IMAGE_MEMORY
from diffadapt.data.stream import Stream
from diffadapt.data.summary import describe, size_notes
from diffadapt.data.trigger_words import add_trigger_word
from diffadapt.models.base import BaseModel

MOST_UNREADABLE = 100  # pictures in a row that streaming leaves out


@dataclass(frozen=True)
class Batch:
    """One microstep's data. With prior preservation the second half of each tensor are the class examples."""

    latents: Tensor  # (B, C, h, w)
    noise: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,), of the training schedule
    conditions: dict[str, Tensor]  # each (B, ...)

    def to(self, device: torch.device) -> "Batch":
        conditions = {name: value.to(device) for name, value in self.conditions.items()}
        return Batch(self.latents.to(device), self.noise.to(device), self.timesteps.to(device), conditions)


class Batches:
    """Encodes examples (moments of the autoencoder, text states) and makes batches from them.

    Args:
        classes: class pictures of prior preservation.
        resolution: side of the square that is cut from a picture, in pixels.
        center_crop: cut the middle, not a random place.
        random_flip: mirror every other picture, at random.
        trigger_word: stands before every caption that does not hold it.
        caption_dropout: share of samples that are told the base's empty caption (or null class).
        noise_offset: deviation of a constant that is added to each channel of the noise.
        cache_latents: "memory", "disk" or "none"; None: memory where it can be.
        cache_dir: folder of "disk".
        buckets: sizes that take the place of the square; cuts are then the middle.
        is_streaming: pictures are neither checked nor encoded beforehand; unreadable ones are left out.
        is_dry_run: nothing is encoded beforehand and nothing kept, for a look at a run that is not made.
    Raises: ValueError for options that exclude each other, and one that lists unreadable pictures.
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
        cache_latents: str | None = None,
        cache_dir: str | None = None,
        buckets: Buckets | None = None,
        is_streaming: bool = False,
        is_dry_run: bool = False,
    ):
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"--caption_dropout is a share between 0 and 1, got {caption_dropout}")
        if trigger_word is not None and not trigger_word.strip():
            raise ValueError(f"--trigger_word is blank, got {trigger_word!r}; give a word, or leave it out")
        self.model, self.seed, self.resolution, self.trigger_word = model, seed, resolution, trigger_word
        self.random_flip, self.caption_dropout, self.noise_offset = random_flip, caption_dropout, noise_offset
        self.is_streaming = is_streaming or isinstance(examples, Stream)
        self.schedule = model.training_schedule()
        self.bucket_of: dict[ImageSource, Size] = {}
        if not self.is_streaming:
            examples = list(examples)  # sources are told apart by identity: one object for each
        sizes = [] if self.is_streaming else _sizes([*examples, *classes])
        self.order = self._order(examples, classes, buckets, sizes)
        self.size_notes = self._size_notes([*examples, *classes], sizes) if sizes else []
        squares = bool(sizes) and all(width == height for width, height in sizes)
        self.center_crop = center_crop or squares or buckets is not None
        self.cache = open_cache(self._cache_kind(cache_latents), cache_dir)
        used = None if is_dry_run else self.cache
        self.encoded_images = EncodedImages(
            model, used, image_memory=0 if self.is_streaming else IMAGE_MEMORY
        )
        self.encoded_captions = EncodedCaptions(model, used, recent=RECENT if self.is_streaming else None)
        self.truncated_captions: list = []  # captions of which the base does not read the end
        if not self.is_streaming:
            self._prepare([*examples, *classes], encode=not is_dry_run)

    @property
    def description(self) -> str:
        """What was found and what becomes of it, for people; several lines when there is more to say."""
        return describe(self)

    def batch(self, positions: Sequence[int]) -> Batch:
        """The samples at these positions of the endless stream."""
        draws = self.order.sample_indices(positions)
        samples = [self._sample(draw) for draw in draws]  # (example, encoded, view)
        captions = [self._caption(draw, example) for draw, (example, *_) in zip(draws, samples, strict=True)]
        if self.is_streaming and not self.truncated_captions:
            self._tell_cut(captions)
        encoded = torch.stack([encoded for _, encoded, _ in samples])
        posterior = None
        if self.model.is_stochastic:
            posterior = self._normal("posterior", draws, (encoded.shape[1] // 2, *encoded.shape[2:]))
        latents = self.model.sample_latents(encoded, posterior)
        return Batch(
            latents=latents,
            noise=self._noise(draws, latents.shape[1:]),
            timesteps=self.schedule.sample_timesteps([self._key("timestep", d) for d in draws], latents),
            conditions={
                **self.encoded_captions.rows(captions),
                **self.model.size_conditions([view for _, _, view in samples]),
            },
        )

    def read_ahead(self, positions: Sequence[int]) -> None:
        """Begins to read the images of these positions in the background; `batch` gives the same with it."""
        draws = self.order.sample_indices(positions)
        examples = [self.order.example(draw) for draw in draws]
        cuts = [self._cut(draw, example) for draw, example in zip(draws, examples, strict=True)]
        sources = [example.source for example in examples]
        self.encoded_images.read_ahead(list(zip(sources, cuts, strict=True)))

    def examples(self, positions: Sequence[int]) -> list[Example]:
        """The pictures and captions of these samples."""
        return [self._sample(draw)[0] for draw in self.order.sample_indices(positions)]

    def names(self, positions: Sequence[int]) -> list[str]:
        """The files of these samples, for messages."""
        return [str(example.source) for example in self.examples(positions)]

    def _sample(self, draw: SampleIndex) -> tuple[Example, Tensor, CropGeometry]:
        """Example, encoded picture and view; streaming takes another sample for an unreadable picture."""
        used = draw
        for _ in range(MOST_UNREADABLE):
            example = self.order.example(used)
            try:
                if example.caption == "":
                    raise UnreadableImage(f"{example.source} has no caption")
                encoded, view = self.encoded_images.get(example.source, self._cut(draw, example))
            except UnreadableImage as error:
                if not self.is_streaming:
                    raise
                tqdm.write(f"left out: {error}")
                used = self.order.substitute(used)
            else:
                return example, encoded, view
        raise ValueError(f"{MOST_UNREADABLE} pictures in a row cannot be read")

    def _cut(self, draw: SampleIndex, example: Example) -> Crop:
        size = self.bucket_of.get(example.source, (self.resolution, self.resolution))
        crop = (0.5, 0.5) if self.center_crop else tuple(uniform(self._key("crop", draw), 2))
        return Crop(size, crop, self.random_flip and uniform(self._key("flip", draw), 1)[0] < 0.5)

    def _caption(self, draw: SampleIndex, example: Example) -> str | int:
        if self.caption_dropout and uniform(self._key("dropped", draw), 1)[0] < self.caption_dropout:
            return self.model.empty_caption
        return add_trigger_word(example.caption, self.trigger_word)

    def _key(self, purpose: str, draw: SampleIndex) -> tuple[str | int, ...]:
        return (purpose, self.seed, draw.role, draw.epoch, draw.sample)

    def _noise(self, draws: Sequence[SampleIndex], shape: Sequence[int]) -> Tensor:
        noise = self._normal("noise", draws, shape)
        if self.noise_offset:
            noise = noise + self.noise_offset * self._normal("noise_offset", draws, (shape[0], 1, 1))
        return noise

    def _normal(self, purpose: str, draws: Sequence[SampleIndex], shape: Sequence[int]) -> Tensor:
        return torch.stack([normal(self._key(purpose, draw), shape) for draw in draws])

    def _order(
        self,
        examples: Sequence[Example] | Stream,
        classes: Sequence[Example],
        buckets: Buckets | None,
        sizes: Sequence[tuple[int, int]],
    ) -> OrderedExamples | Stream:
        if isinstance(examples, Stream):
            return examples
        if not examples:
            raise ValueError("there are no pictures to train on")
        if buckets is None:
            return OrderedExamples(examples, classes, ShuffledOrder(len(examples), len(classes), self.seed))
        if self.is_streaming or classes:
            other = "--streaming" if self.is_streaming else "class pictures"
            raise ValueError(f"aspect-ratio buckets and {other} do not go together")
        members: dict[Size, list[int]] = {}
        for index, (example, size) in enumerate(zip(examples, sizes, strict=True)):
            self.bucket_of[example.source] = buckets.nearest(size)
            members.setdefault(self.bucket_of[example.source], []).append(index)
        order = BucketOrder([members[size] for size in sorted(members)], buckets.group, self.seed)
        return OrderedExamples(examples, (), order)

    def _size_notes(self, examples: Sequence[Example], sizes: Sequence[tuple[int, int]]) -> list[str]:
        square = (self.resolution, self.resolution)
        size_of = {example.source: size for example, size in zip(examples, sizes, strict=True)}
        targets = [self.bucket_of.get(source, square) for source in size_of]
        return size_notes(list(size_of), list(size_of.values()), targets)

    def _cache_kind(self, wanted: str | None) -> str:
        if wanted is None:
            return "memory" if self.center_crop and not self.is_streaming else "none"
        if wanted == "memory" and self.is_streaming:
            raise ValueError("--streaming is for sets larger than memory: --cache_latents disk or none")
        if wanted != "none" and not self.center_crop:
            raise ValueError(
                f"--cache_latents {wanted} needs pictures that are always cut alike: add --center_crop "
                "or --aspect_ratio_buckets"
            )
        return wanted

    def _tell_cut(self, captions: Sequence[str | int]) -> None:
        """What is not read of the first caption that is too long: streaming meets it late."""
        if any(isinstance(caption, str) for caption in captions):
            self.truncated_captions = self.model.truncated_captions(captions)
        for cut in self.truncated_captions[:1]:
            tqdm.write(
                f"too long for the tokenizer, so not read: {cut.lost!r} of {cut.caption!r} "
                f"({cut.length} tokens); captions after this one are cut without notice"
            )

    def _prepare(self, examples: Sequence[Example], *, encode: bool) -> None:
        """Checks the captions and encodes everything once, so that a fault shows before the first step."""
        if encode and self.cache is not None:
            flips = (False, True) if self.random_flip else (False,)
            self.encoded_images.prepare(
                [
                    (e.source, Crop(self.bucket_of.get(e.source, (self.resolution,) * 2), flip=flip))
                    for e in examples
                    for flip in flips
                ]
            )
        missing = [str(e.source) for e in examples if e.caption == ""]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(examples)} pictures have no caption:\n{indented_list(missing)}"
            )
        captions = [add_trigger_word(e.caption, self.trigger_word) for e in examples]
        if encode:
            self.encoded_captions.prepare(
                captions + ([self.model.empty_caption] if self.caption_dropout else [])
            )
        if any(isinstance(caption, str) for caption in captions):
            self.truncated_captions = self.model.truncated_captions(captions)


def _sizes(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """(width, height) of each example's image; one that is there several times is read once."""
    sources = {id(example.source): example.source for example in examples}
    sizes = dict(zip(sources, check_images(list(sources.values())), strict=True))
    return [sizes[id(example.source)] for example in examples]
