"""Aspect-ratio buckets: images keep their shape, and all images of a batch have one size."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from diffadapt.common.keyed_random import permutation
from diffadapt.data.examples import SampleIndex

Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True)
class Buckets:
    """The sizes of images, and the number of samples that share one.

    Attributes:
        sizes: the sizes to choose from.
        group: the number of consecutive samples of one size: those of an optimizer step.
    """

    sizes: tuple[Size, ...]
    group: int

    def nearest(self, image_size: tuple[int, int]) -> Size:
        """The size whose aspect ratio is closest, in logarithms, to that of `image_size` (width, height)."""
        # log(h / w), so that 2 : 1 is as far from the square as 1 : 2
        log_ratio = math.log(image_size[1] / image_size[0])
        return min(self.sizes, key=lambda size: abs(math.log(size[0] / size[1]) - log_ratio))


def bucket_sizes(text: str, *, resolution: int, step: int) -> tuple[Size, ...]:
    """Parses sizes written as `auto` or as "height,width;height,width".

    Args:
        text: the value of `--aspect_ratio_buckets`. `auto` stands for all sizes with sides in multiples of
            `step`, from half to twice the resolution, with the most pixels up to resolution x resolution.
        resolution: the side of square images, in pixels.
        step: the number that sides must be multiples of.

    Raises:
        ValueError: the text has another form, or a side is not a multiple of `step`.
    """
    if text == "auto":
        return _auto_sizes(resolution, step)
    sizes = []
    try:
        for part in text.split(";"):
            if part.strip():
                height, width = map(int, part.split(","))
                sizes.append((height, width))
    except ValueError:  # not a number, or not two
        sizes = []
    if not sizes:
        raise ValueError(f'--aspect_ratio_buckets takes auto or "height,width;height,width", got {text!r}')
    for height, width in sizes:
        if min(height, width) < step or height % step or width % step:
            raise ValueError(
                f"--aspect_ratio_buckets: {height},{width} is impossible; this base needs multiples of {step}"
            )
    return tuple(sizes)


def _auto_sizes(resolution: int, step: int) -> tuple[Size, ...]:
    """See `bucket_sizes`."""
    sizes = set()
    for long_side in range(max(resolution, step), 2 * resolution + 1, step):
        short_side = resolution * resolution // long_side // step * step  # rounded down to a multiple
        if short_side >= max(resolution // 2, step):
            sizes |= {(long_side, short_side), (short_side, long_side)}
    if not sizes:
        raise ValueError(f"no sizes of about {resolution} x {resolution} pixels in multiples of {step}")
    return tuple(sorted(sizes))


@dataclass(frozen=True)
class BucketOrder:
    """The endless stream of samples in groups of one size: position p belongs to group p // group.

    Each bucket is an endless stream of its own images, pass after pass, and each pass is shuffled anew. An
    epoch takes all groups that are complete by then from every bucket, in shuffled order. The remainder, less
    than a group per bucket, comes first in the next epoch. So all images are used equally often, and any
    number of processes or accumulation steps that share a group see one size. Groups of a bucket with fewer
    images than a group hold some images more than once, each time with other noise.

    Attributes:
        members: the indices of the examples in each bucket; no bucket is empty.
        group: the number of samples in a group.
        seed: the seed of the run.
    """

    members: Sequence[Sequence[int]]
    group: int
    seed: int
    _epoch_starts: list[int] = field(default_factory=lambda: [0], repr=False)  # first group of each epoch

    def sample_indices(self, positions: Sequence[int]) -> list[SampleIndex]:
        """The samples at these positions."""
        samples = []
        for position in positions:
            group, place = divmod(position, self.group)
            samples.append(self._sample_index(group, place))
        return samples

    def _sample_index(self, group: int, place: int) -> SampleIndex:
        # the first groups of epochs, computed as far as this position needs them
        while self._epoch_starts[-1] <= group:
            self._epoch_starts.append(self._complete_groups(len(self._epoch_starts)))
        epoch = bisect_right(self._epoch_starts, group) - 1
        bucket, number = self._schedule(epoch)[group - self._epoch_starts[epoch]]
        members = self.members[bucket]
        # the bucket's own stream goes on over epochs: its group `number` begins after number * group samples
        pass_number, pass_place = divmod(number * self.group + place, len(members))
        shuffled = permutation(("bucket", self.seed, bucket, pass_number), len(members))
        index = members[int(shuffled[pass_place])]
        return SampleIndex("instance", index, pass_number, index)

    def _complete_groups(self, epochs: int) -> int:
        """The number of groups that are complete after this many epochs."""
        return sum(epochs * len(members) // self.group for members in self.members)

    def _schedule(self, epoch: int) -> list[tuple[int, int]]:
        """(bucket, number of the group within the bucket) of every group of an epoch, in order."""
        groups = []
        # After e epochs a bucket of n images has floor(e n / group) complete groups.
        for bucket, members in enumerate(self.members):
            first = epoch * len(members) // self.group
            end = (epoch + 1) * len(members) // self.group
            for number in range(first, end):
                groups.append((bucket, number))
        order = permutation(("buckets", self.seed, epoch), len(groups))
        return [groups[index] for index in order.tolist()]
