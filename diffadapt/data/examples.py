"""Training examples, and the order in which they are used."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from diffadapt.common.images import ImageSource, list_images
from diffadapt.common.keyed_random import permutation


@dataclass(frozen=True)
class Example:
    """An image with its caption, or with the number of its class."""

    source: ImageSource
    caption: str | int


@dataclass(frozen=True)
class SampleIndex:
    """One use of an example in a run.

    (role, epoch, sample) is unique in a run, so it keys all random numbers of this use.

    Attributes:
        role: `"instance"`, or `"class"` for prior preservation.
        index: the index of the example among those of its role.
        epoch: the epoch, from 0 on.
        sample: the position within the epoch before shuffling.
    """

    role: str
    index: int
    epoch: int
    sample: int


class SampleOrder(Protocol):
    """The order of an endless stream of samples, as a function of the position alone."""

    def sample_indices(self, positions: Sequence[int]) -> list[SampleIndex]:
        """The samples at these positions of the endless stream."""
        ...


def folder_examples(folder: str | Path, caption: str | int, *, follow_links: bool = False) -> list[Example]:
    """All images of a folder, with one caption."""
    return [Example(path, caption) for path in list_images(folder, follow_links=follow_links)]


@dataclass(frozen=True)
class ShuffledOrder:
    """The order of a fixed set: one shuffled epoch after another, with batches that may span two epochs.

    Position p is sample p mod length of epoch p div length. With class images an epoch is as long as the
    larger set, and the smaller one is repeated, as in diffusers' DreamBooth script.

    Attributes:
        instances: the number of instance examples.
        classes: the number of class examples; 0 without prior preservation.
        seed: the seed of the run.
    """

    instances: int
    classes: int
    seed: int

    @property
    def length(self) -> int:
        """The number of samples in an epoch."""
        return max(self.instances, self.classes)

    def sample_indices(self, positions: Sequence[int]) -> list[SampleIndex]:
        """The instance samples at these positions, followed by the class samples if there are any."""
        instance_samples = []
        class_samples = []
        for position in positions:
            epoch, place = divmod(position, self.length)
            # keyed by the epoch, so the order needs no state; `permutation` keeps the latest ones
            sample = int(permutation(("order", self.seed, epoch), self.length)[place])
            instance_samples.append(SampleIndex("instance", sample % self.instances, epoch, sample))
            if self.classes:
                class_samples.append(SampleIndex("class", sample % self.classes, epoch, sample))
        return instance_samples + class_samples


@dataclass(frozen=True)
class OrderedExamples:
    """Examples that can be looked up, and the order in which they are used.

    Attributes:
        examples: the examples to train on.
        classes: the class examples of prior preservation.
        order: their order.
    """

    examples: Sequence[Example]
    classes: Sequence[Example]
    order: SampleOrder

    def sample_indices(self, positions: Sequence[int]) -> list[SampleIndex]:
        """The samples at these positions of the endless stream."""
        return self.order.sample_indices(positions)

    def example(self, sample: SampleIndex) -> Example:
        """The example of a sample."""
        examples = self.classes if sample.role == "class" else self.examples
        return examples[sample.index]

    def substitute(self, sample: SampleIndex) -> SampleIndex:
        """The sample with the next example, in place of one that cannot be read."""
        return replace(sample, index=(sample.index + 1) % len(self.examples))
