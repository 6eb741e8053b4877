"""Examples that are read one after another and never all held: order and resume from a position alone.

The samples of an epoch are read in the stream's own order, in blocks of `buffer` samples, and each block is
shuffled by itself with a key of (seed, epoch, block). So the sample at a position follows from the position:
a resumed run opens the epoch anew and reads over what lies before its block, without decoding pictures. The
length of an epoch is learned when its end is met for the first time; a run that resumes in a later epoch
reads over the first one to learn it again.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from diffadapt.common.keyed_random import permutation
from diffadapt.data.examples import Example, SampleIndex

KEPT_BLOCKS = 2  # a batch can lie across two


class Stream:
    """Examples from an iterator that can be opened again for every epoch.

    Args:
        open_epoch: epoch number -> its examples; the same number must give the same ones in the same order.
        buffer: samples that are held and shuffled together.
    """

    def __init__(self, open_epoch: Callable[[int], Iterator[Example]], *, seed: int, buffer: int = 1000):
        if buffer < 1:
            raise ValueError(f"the buffer of a stream holds at least 1 sample, got {buffer}")
        self._open, self.seed, self.buffer = open_epoch, seed, buffer
        self._length: int | None = None  # samples of an epoch, once known
        self._blocks: OrderedDict[tuple[int, int], list[Example]] = OrderedDict()
        self._epoch, self._next_block, self._rows = -1, 0, iter(())  # where reading stands

    def sample_indices(self, positions: Sequence[int]) -> list[SampleIndex]:
        """The draws of these positions of the endless stream; `index` is a row of the epoch."""
        return [self._draw(position) for position in positions]

    def example(self, draw: SampleIndex) -> Example:
        """The picture and caption of a draw."""
        number, place = divmod(draw.index, self.buffer)
        return self._block(draw.epoch, number)[place]

    def substitute(self, draw: SampleIndex) -> SampleIndex:
        """The draw with the next sample of the same block, for one that cannot be read."""
        number, place = divmod(draw.index, self.buffer)
        size = len(self._block(draw.epoch, number))
        return replace(draw, index=number * self.buffer + (place + 1) % size)

    def _draw(self, position: int) -> SampleIndex:
        epoch, place = self._locate(position)
        number, spot = divmod(place, self.buffer)
        size = len(self._block(epoch, number))
        row = number * self.buffer + int(permutation(("block", self.seed, epoch, number), size)[spot])
        return SampleIndex("instance", row, epoch, row)

    def _locate(self, position: int) -> tuple[int, int]:
        """Epoch and place within it; reads on until the length is known, where that matters."""
        while self._length is None:
            number, place = divmod(position, self.buffer)
            if place < len(self._block(0, number)):
                return 0, position
        return divmod(position, self._length)

    def _block(self, epoch: int, number: int) -> list[Example]:
        key = (epoch, number)
        if key not in self._blocks:
            self._blocks[key] = self._read(epoch, number)
            while len(self._blocks) > KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(key)
        return self._blocks[key]

    def _read(self, epoch: int, number: int) -> list[Example]:
        """One block; a block that is not full ends the epoch and tells its length."""
        if epoch != self._epoch or number < self._next_block:
            self._epoch, self._next_block, self._rows = epoch, 0, self._open(epoch)
        before = number * self.buffer
        skip = before - self._next_block * self.buffer
        skipped = sum(1 for _ in islice(self._rows, skip))
        block = list(islice(self._rows, self.buffer)) if skipped == skip else []
        self._next_block = number + 1
        if len(block) < self.buffer:
            self._note_length(before - (skip - skipped) + len(block))
        return block

    def _note_length(self, length: int) -> None:
        if length == 0:
            raise ValueError("the stream holds no samples")
        if self._length not in (None, length):
            raise ValueError(
                f"the stream held {self._length} samples in one epoch and {length} in another; "
                "a run can only be repeated and resumed when it holds the same ones every time"
            )
        self._length = length
