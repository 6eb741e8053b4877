"""Streams: examples that are read in sequence and never all held, in a reproducible order.

The samples of an epoch are read in the order of the source, in blocks of `buffer` samples, and each block is
shuffled with a key of (seed, epoch, block). So the sample at a position depends on the position alone: a
resumed run opens the epoch again and skips the samples before its block without decoding images. The length
of an epoch is learned when its end is reached for the first time; a run that resumes in a later epoch reads
through the first one to learn it again.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from diffadapt.common.keyed_random import permutation
from diffadapt.data.examples import Example, SampleIndex

BLOCKS_IN_MEMORY = 2  # a batch may span two


class Stream:
    """Examples from an iterator that can be opened again for every epoch.

    Args:
        open_epoch: epoch -> its examples; the same epoch must give the same examples in the same order.
        seed: the seed of the shuffling.
        buffer: the number of samples that are held and shuffled together.

    Raises:
        ValueError: the buffer is empty.
    """

    def __init__(self, open_epoch: Callable[[int], Iterator[Example]], *, seed: int, buffer: int = 1000):
        if buffer < 1:
            raise ValueError(f"the buffer of a stream holds at least 1 sample, got {buffer}")
        self._open_epoch = open_epoch
        self.seed = seed
        self.buffer = buffer
        self._length: int | None = None  # samples of an epoch, once known
        self._blocks: OrderedDict[tuple[int, int], list[Example]] = OrderedDict()  # by epoch and number
        # The state of reading: the open epoch, the number of its next block, and its remaining samples.
        self._epoch = -1
        self._next_block = 0
        self._samples: Iterator[Example] = iter(())

    def sample_indices(self, positions: Sequence[int]) -> list[SampleIndex]:
        """The samples at these positions of the endless stream; `index` is a row of the epoch."""
        return [self._sample_index(position) for position in positions]

    def example(self, sample: SampleIndex) -> Example:
        """The example of a sample."""
        block, place = divmod(sample.index, self.buffer)
        return self._block(sample.epoch, block)[place]

    def substitute(self, sample: SampleIndex) -> SampleIndex:
        """The sample with the next example of the same block, in place of one that cannot be read."""
        block, place = divmod(sample.index, self.buffer)
        size = len(self._block(sample.epoch, block))
        return replace(sample, index=block * self.buffer + (place + 1) % size)

    def _sample_index(self, position: int) -> SampleIndex:
        epoch, place = self._locate(position)
        block, place_in_block = divmod(place, self.buffer)
        size = len(self._block(epoch, block))
        shuffled = permutation(("block", self.seed, epoch, block), size)
        row = block * self.buffer + int(shuffled[place_in_block])
        return SampleIndex("instance", row, epoch, row)

    def _locate(self, position: int) -> tuple[int, int]:
        """The epoch of a position and the place in it; may read on to learn the length of an epoch."""
        while self._length is None:
            block, place = divmod(position, self.buffer)
            # Either the block holds the position, or reading it has met the end and set the length.
            if place < len(self._block(0, block)):
                return 0, position
        return divmod(position, self._length)

    def _block(self, epoch: int, number: int) -> list[Example]:
        """The samples of a block, in the order of the source."""
        key = (epoch, number)
        if key not in self._blocks:
            self._blocks[key] = self._read_block(epoch, number)
            while len(self._blocks) > BLOCKS_IN_MEMORY:  # the one used longest ago goes first
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(key)
        return self._blocks[key]

    def _read_block(self, epoch: int, number: int) -> list[Example]:
        """Reads a block; one that is not full ends the epoch and gives its length."""
        # an iterator only goes forward: another epoch, or a block behind it, needs a new one
        if epoch != self._epoch or number < self._next_block:
            self._epoch = epoch
            self._next_block = 0
            self._samples = self._open_epoch(epoch)
        block_start = number * self.buffer
        to_skip = block_start - self._next_block * self.buffer
        skipped = sum(1 for _ in islice(self._samples, to_skip))  # fewer where the epoch ends before
        block = []
        if skipped == to_skip:
            block = list(islice(self._samples, self.buffer))
        self._next_block = number + 1
        if len(block) < self.buffer:
            self._set_length(block_start - (to_skip - skipped) + len(block))
        return block

    def _set_length(self, length: int) -> None:
        """Stores the length of an epoch, which must be the same for all."""
        if length == 0:
            raise ValueError("the stream holds no samples")
        if self._length not in (None, length):
            raise ValueError(
                f"the stream held {self._length} samples in one epoch and {length} in another; "
                "a run can only be repeated and resumed when it holds the same ones every time"
            )
        self._length = length
