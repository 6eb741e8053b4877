"""What a run found as its data, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffadapt.common.images import ImageSource, PlannedImage
from diffadapt.common.messages import indented_list
from diffadapt.data.cache import DiskCache
from diffadapt.data.stream import Stream
from diffadapt.models.text_conditioned import TruncatedCaption

if TYPE_CHECKING:
    from diffadapt.data.batches import Batches

MUCH_ENLARGED = 2  # times its size
MUCH_CROPPED = 0.5  # share of its area


def describe(batches: Batches) -> str:
    """How many pictures, how they are cut and encoded, what is changed at random, which captions are cut."""
    lines = [f"{_found(batches)}, {_shapes(batches)}, {_encoding(batches)}"]
    changes = ["half of them mirrored"] if batches.random_flip else []
    changes += [f"{batches.caption_dropout:.0%} told no caption"] if batches.caption_dropout else []
    changes += [f"trigger word {batches.trigger_word!r}"] if batches.trigger_word else []
    if changes:
        lines.append(", ".join(changes))
    lines += batches.size_notes
    if batches.truncated_captions:
        lines.append(describe_truncated_captions(batches.truncated_captions))
    return "\n".join(lines)


def size_notes(
    sources: Sequence[ImageSource], sizes: Sequence[tuple[int, int]], targets: Sequence[tuple[int, int]]
) -> list[str]:
    """Images that training shows otherwise than a person would expect: very small ones and very long ones.

    Args:
        sizes: (width, height) of each image; targets: (height, width) of what is cut from it.
    """
    enlarged, cropped = [], []
    for source, (width, height), (target_height, target_width) in zip(sources, sizes, targets, strict=True):
        if isinstance(source, PlannedImage):
            continue
        scale = max(target_width / width, target_height / height)
        share_outside = 1 - target_width * target_height / (scale**2 * width * height)
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


def describe_truncated_captions(cuts: Sequence[TruncatedCaption]) -> str:
    """Which words of captions or prompts are not read."""
    lost = [f"{c.lost!r} of {c.caption!r} ({c.length} tokens, {c.limit} are read)" for c in cuts]
    return f"too long for the tokenizer, so not read:\n{indented_list(lost, limit=5)}"


def _found(batches: Batches) -> str:
    order = batches.order
    if isinstance(order, Stream):
        return f"a stream, shuffled in blocks of {order.buffer}"
    undrawn = sum(isinstance(example.source, PlannedImage) for example in order.classes)
    classes = f", {len(order.classes)} class pictures" if order.classes else ""
    classes += f" ({undrawn} of them still to be drawn by the base)" if undrawn else ""
    distinct = len({id(example.source) for example in order.examples})
    repeated = f" ({len(order.examples)} with repeats)" if distinct < len(order.examples) else ""
    return f"{distinct} pictures{repeated}{classes}"


def _shapes(batches: Batches) -> str:
    if not batches.bucket_of:
        return f"{batches.resolution} pixels"
    counts = Counter(batches.bucket_of.values())
    return ", ".join(f"{count} of {h} x {w}" for (h, w), count in sorted(counts.items()))


def _encoding(batches: Batches) -> str:
    if isinstance(batches.cache, DiskCache):
        return f"encoded once, kept in {batches.cache.folder}"
    if batches.cache is not None:
        return "encoded once"
    return ("" if batches.center_crop else "cut at random and ") + "encoded in every step"
