"""Aspect-ratio buckets: pictures keep their shape, and every batch holds pictures of one size only."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from diffadapt.common.keyed_random import permutation
from diffadapt.data.examples import SampleIndex

Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True)
class Buckets:
    """The sizes there are, and how many samples must share one: those of an optimizer step."""

    sizes: tuple[Size, ...]
    group: int

    def nearest(self, image_size: tuple[int, int]) -> Size:
        """The size whose shape is nearest to a picture of `image_size` (width, height)."""
        ratio = math.log(image_size[1] / image_size[0])
        return min(self.sizes, key=lambda size: abs(math.log(size[0] / size[1]) - ratio))


def bucket_sizes(text: str, *, resolution: int, step: int) -> tuple[Size, ...]:
    """Sizes from `auto` or from "height,width;height,width".

    `auto` gives all sizes in multiples of `step` with sides from half to twice the resolution and the most
    pixels that do not exceed resolution x resolution.
    Raises: ValueError for text of another form, or for sides that are no multiple of `step`.
    """
    if text == "auto":
        return _auto(resolution, step)
    try:
        sizes = tuple(
            tuple(int(side) for side in part.split(",")) for part in text.split(";") if part.strip()
        )
    except ValueError:
        sizes = ()
    if not sizes or any(len(size) != 2 for size in sizes):
        raise ValueError(f'--aspect_ratio_buckets takes auto or "height,width;height,width", got {text!r}')
    for height, width in sizes:
        if min(height, width) < step or height % step or width % step:
            raise ValueError(
                f"--aspect_ratio_buckets: {height},{width} will not do; this base needs multiples of {step}"
            )
    return sizes


def _auto(resolution: int, step: int) -> tuple[Size, ...]:
    sizes = set()
    for long in range(max(resolution, step), 2 * resolution + 1, step):
        short = resolution * resolution // long // step * step
        if short >= max(resolution // 2, step):
            sizes |= {(long, short), (short, long)}
    if not sizes:
        raise ValueError(f"no sizes of about {resolution} x {resolution} pixels in multiples of {step}")
    return tuple(sorted(sizes))


@dataclass(frozen=True)
class BucketOrder:
    """The endless stream of samples in groups of one size: position p belongs to group p // group.

    Each bucket is an endless stream of its own pictures, pass after pass, each pass shuffled anew. An epoch
    takes from every bucket as many full groups as are complete by then, in shuffled order; what is left, less
    than a group per bucket, is the first to be used in the next epoch. So all pictures are used equally
    often, and any number of processes or microsteps that share a group see one size. Groups of a bucket with
    fewer pictures than a group hold some of them more than once, each time with other noise.
    """

    members: Sequence[Sequence[int]]  # example indices of each bucket, none empty
    group: int
    seed: int
    _epochs: list[int] = field(default_factory=lambda: [0], repr=False)  # first group of each epoch

    def sample_indices(self, positions: Sequence[int]) -> list[SampleIndex]:
        """The draws of these positions."""
        return [self._draw(*divmod(position, self.group)) for position in positions]

    def _draw(self, group: int, place: int) -> SampleIndex:
        while self._epochs[-1] <= group:
            self._epochs.append(self._complete(len(self._epochs)))
        epoch = bisect_right(self._epochs, group) - 1
        bucket, number = self._schedule(epoch)[group - self._epochs[epoch]]
        members = self.members[bucket]
        walk, spot = divmod(number * self.group + place, len(members))
        index = members[int(permutation(("bucket", self.seed, bucket, walk), len(members))[spot])]
        return SampleIndex("instance", index, walk, index)

    def _complete(self, epochs: int) -> int:
        """How many groups are full after so many epochs."""
        return sum(epochs * len(members) // self.group for members in self.members)

    def _schedule(self, epoch: int) -> list[tuple[int, int]]:
        """(bucket, number of the group within the bucket) of every group of an epoch, in order."""
        groups = [
            (bucket, number)
            for bucket, members in enumerate(self.members)
            for number in range(epoch * len(members) // self.group, (epoch + 1) * len(members) // self.group)
        ]
        order = permutation(("buckets", self.seed, epoch), len(groups))
        return [groups[index] for index in order.tolist()]
