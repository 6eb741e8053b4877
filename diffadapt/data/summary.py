"""The summary of a run's training data, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffadapt.common.images import ImageSource, PlannedImage
from diffadapt.common.messages import indented_list
from diffadapt.data.cache import DiskCache, MemoryCache
from diffadapt.data.examples import OrderedExamples
from diffadapt.data.stream import Stream
from diffadapt.models.caption_limits import TruncatedCaption

MUCH_ENLARGED = 2  # scale above which an enlarged image is reported
MUCH_CROPPED = 0.5  # share of the area outside of the crop above which an image is reported


@dataclass(frozen=True)
class DataSummary:
    """The facts about training data that a summary tells.

    Attributes:
        order: the examples and their order.
        resolution: the side of the square crops, in pixels.
        bucket_of: image -> (height, width) of its bucket; empty without buckets.
        cache: the cache of encoded images; None if images are encoded in every step.
        center_crop: whether the crop of an image is always the same.
        random_flip: whether half of the images are mirrored.
        caption_dropout: the share of samples without their caption.
        trigger_word: the word added to captions.
        size_notes: the notes of `size_notes`.
        truncated_captions: the captions that are too long for the tokenizer.
    """

    order: OrderedExamples | Stream
    resolution: int
    bucket_of: Mapping[ImageSource, tuple[int, int]]
    cache: MemoryCache | DiskCache | None
    center_crop: bool
    random_flip: bool
    caption_dropout: float
    trigger_word: str | None
    size_notes: Sequence[str]
    truncated_captions: Sequence[TruncatedCaption]


def describe(summary: DataSummary) -> str:
    """The summary as text: number and size of images, augmentation, notes on sizes, truncated captions."""
    lines = [f"{_count_images(summary.order)}, {_describe_sizes(summary)}, {_describe_encoding(summary)}"]
    augmentation = []
    if summary.random_flip:
        augmentation.append("half of them mirrored")
    if summary.caption_dropout:
        augmentation.append(f"{summary.caption_dropout:.0%} without caption")
    if summary.trigger_word:
        augmentation.append(f"trigger word {summary.trigger_word!r}")
    if augmentation:
        lines.append(", ".join(augmentation))
    lines += summary.size_notes
    if summary.truncated_captions:
        lines.append(describe_truncated_captions(summary.truncated_captions))
    return "\n".join(lines)


def size_notes(
    sources: Sequence[ImageSource], sizes: Sequence[tuple[int, int]], crops: Sequence[tuple[int, int]]
) -> list[str]:
    """Notes about images that are much enlarged or much cropped in training.

    Args:
        sources: the images.
        sizes: (width, height) of each image.
        crops: (height, width) of the crop of each image.
    """
    enlarged = []
    cropped = []
    for source, (width, height), (crop_height, crop_width) in zip(sources, sizes, crops, strict=True):
        if isinstance(source, PlannedImage):  # its gray placeholder has no size of its own
            continue
        # The image is scaled until it just covers the crop; the rest of its area is cropped away.
        scale = max(crop_width / width, crop_height / height)
        # 1 - H W / (s^2 h w), with H x W the crop and s h x s w the scaled image
        share_outside = 1 - crop_width * crop_height / (scale**2 * width * height)
        name = f"{source} ({width} x {height} pixels)"
        if scale > MUCH_ENLARGED:
            enlarged.append((scale, name))
        if share_outside > MUCH_CROPPED:
            cropped.append((share_outside, name))
    notes = []
    if enlarged:
        scale, name = max(enlarged)
        notes.append(f"{len(enlarged)} images are enlarged more than twice, most {name}: {scale:.3g} times")
    if cropped:
        share, name = max(cropped)
        notes.append(
            f"{len(cropped)} images lose more than half of their area to the crop, most {name}: {share:.0%}"
        )
    return notes


def describe_truncated_captions(captions: Sequence[TruncatedCaption]) -> str:
    """Captions or prompts that are too long, and the words that are lost of each."""
    lines = []
    for caption in captions:
        limits = f"{caption.length} tokens, {caption.limit} are read"
        lines.append(f"{caption.lost!r} of {caption.caption!r} ({limits})")
    return f"too long for the tokenizer, so not read:\n{indented_list(lines, limit=5)}"


def _count_images(order: OrderedExamples | Stream) -> str:
    if isinstance(order, Stream):
        return f"a stream, shuffled in blocks of {order.buffer}"
    distinct = len({id(example.source) for example in order.examples})
    text = f"{distinct} images"
    if distinct < len(order.examples):
        text += f" ({len(order.examples)} with repeats)"
    if order.classes:
        text += f", {len(order.classes)} class images"
        planned = sum(isinstance(example.source, PlannedImage) for example in order.classes)
        if planned:
            text += f" ({planned} of them still to be generated by the base)"
    return text


def _describe_sizes(summary: DataSummary) -> str:
    if not summary.bucket_of:
        return f"{summary.resolution} pixels"
    counts = Counter(summary.bucket_of.values())
    sizes = []
    for (height, width), count in sorted(counts.items()):
        sizes.append(f"{count} of {height} x {width}")
    return ", ".join(sizes)


def _describe_encoding(summary: DataSummary) -> str:
    if isinstance(summary.cache, DiskCache):
        return f"encoded once, kept in {summary.cache.folder}"
    if summary.cache is not None:
        return "encoded once"
    if summary.center_crop:
        return "encoded in every step"
    return "cropped at random and encoded in every step"
