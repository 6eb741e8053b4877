"""Which pictures are trained on, with which words, and in which order."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffadapt.common.images import ImageSource, list_images
from diffadapt.common.keyed_random import permutation

if TYPE_CHECKING:
    from diffadapt.data.buckets import BucketOrder


@dataclass(frozen=True)
class Example:
    """One picture and what it shows: words, or the number of its class."""

    source: ImageSource
    caption: str | int


@dataclass(frozen=True)
class Draw:
    """One use of an example. (role, epoch, sample) is unique in a run, so it keys the draw's randomness."""

    role: str  # "instance", or "class" for prior preservation
    index: int  # which example of that role
    epoch: int
    sample: int  # place within the epoch before shuffling: an index and how often it was used already


def folder_examples(folder: str | Path, caption: str | int, *, follow_links: bool = False) -> list[Example]:
    """All images of a folder under one caption."""
    return [Example(path, caption) for path in list_images(folder, follow_links=follow_links)]


@dataclass(frozen=True)
class Order:
    """The endless stream of samples: epoch after epoch, each in its own order, batches full across epochs.

    Position p is sample p mod length of epoch p div length. With class pictures an epoch is as long as the
    larger set and the smaller one is walked again and again, as in diffusers' DreamBooth script.
    """

    instances: int
    classes: int
    seed: int

    @property
    def length(self) -> int:
        return max(self.instances, self.classes)

    def draws(self, positions: Sequence[int]) -> list[Draw]:
        """The instance draws of these positions, then (with class pictures) their class draws."""
        places = [(self._sample(position), position // self.length) for position in positions]
        draws = [Draw("instance", sample % self.instances, epoch, sample) for sample, epoch in places]
        if self.classes:
            draws += [Draw("class", sample % self.classes, epoch, sample) for sample, epoch in places]
        return draws

    def _sample(self, position: int) -> int:
        epoch, place = divmod(position, self.length)
        return int(permutation(("order", self.seed, epoch), self.length)[place])


@dataclass(frozen=True)
class Examples:
    """Examples that can be looked up, and the order in which they are drawn."""

    examples: Sequence[Example]
    classes: Sequence[Example]
    order: "Order | BucketOrder"

    def draws(self, positions: Sequence[int]) -> list[Draw]:
        """The draws of these positions of the endless stream."""
        return self.order.draws(positions)

    def example(self, draw: Draw) -> Example:
        """The picture and caption of a draw."""
        return (self.classes if draw.role == "class" else self.examples)[draw.index]

    def substitute(self, draw: Draw) -> Draw:
        """The draw with the next example, for one that cannot be read."""
        return replace(draw, index=(draw.index + 1) % len(self.examples))
