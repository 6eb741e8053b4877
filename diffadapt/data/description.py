"""What a run found as its data, in words."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from diffadapt.data.cache import DiskCache
from diffadapt.data.images import UndrawnImage, listed
from diffadapt.data.stream import Stream

if TYPE_CHECKING:
    from diffadapt.data.batches import Batches


def describe(batches: Batches) -> str:
    """How many pictures, how they are cut and encoded, what is changed at random, which captions are cut."""
    lines = [f"{_found(batches)}, {_shapes(batches)}, {_encoding(batches)}"]
    changes = ["half of them mirrored"] if batches.random_flip else []
    changes += [f"{batches.caption_dropout:.0%} told no caption"] if batches.caption_dropout else []
    changes += [f"trigger word {batches.trigger_word!r}"] if batches.trigger_word else []
    if changes:
        lines.append(", ".join(changes))
    if batches.cut_captions:
        lost = [f"{c.lost!r} of {c.caption!r} ({c.length} tokens)" for c in batches.cut_captions]
        lines.append(f"too long for the tokenizer, so not read:\n{listed(lost, most=5)}")
    return "\n".join(lines)


def _found(batches: Batches) -> str:
    order = batches.order
    if isinstance(order, Stream):
        return f"a stream, shuffled in blocks of {order.buffer}"
    undrawn = sum(isinstance(example.source, UndrawnImage) for example in order.classes)
    classes = f", {len(order.classes)} class pictures" if order.classes else ""
    classes += f" ({undrawn} of them still to be drawn by the base)" if undrawn else ""
    return f"{len(order.examples)} pictures{classes}"


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
