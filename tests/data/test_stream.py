"""A stream's sample follows from its position: after any jump, in any epoch, in shuffled blocks."""

import pytest

from diffadapt.common.images import StoredImage
from diffadapt.data.examples import Example
from diffadapt.data.stream import Stream


class Source:
    """Twelve samples an epoch, in another order of their own in every epoch; counts what was opened."""

    def __init__(self, length=12):
        self.length, self.opened, self.read = length, [], 0

    def __call__(self, epoch):
        self.opened.append(epoch)
        for row in range(self.length):
            self.read += 1
            name = (7 * row + epoch) % self.length
            yield Example(StoredImage(str(name), b""), f"{name}")


def stream(source=None, **given):
    return Stream(source or Source(), **{"seed": 0, "buffer": 5, **given})


def captions(some, positions):
    return [some.example(draw).caption for draw in some.sample_indices(positions)]


def test_every_epoch_holds_every_sample_once_in_its_own_order():
    drawn = captions(stream(), range(36))
    epochs = [drawn[start : start + 12] for start in (0, 12, 24)]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(12)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("start", [0, 3, 9, 11, 12, 20, 30])
def test_a_resumed_stream_goes_on_with_the_same_samples(start):
    whole = stream()
    expected = [captions(whole, range(p, p + 4)) for p in range(0, 36, 4)]
    flat = [caption for part in expected for caption in part]
    assert captions(stream(), range(start, start + 4)) == flat[start : start + 4]


def test_samples_are_shuffled_within_blocks_and_by_the_seed():
    first = captions(stream(), range(5))
    assert first != captions(stream(seed=1), range(5))
    assert sorted(first) == sorted(captions(stream(seed=1), range(5)))  # the same block
    assert len({(d.epoch, d.sample) for d in stream().sample_indices(range(36))}) == 36


def test_reading_goes_forward_once_per_epoch():
    source = Source()
    some = stream(source)
    for position in range(0, 24, 3):
        captions(some, range(position, position + 3))
    assert source.opened == [0, 1]
    assert source.read == 24


@pytest.mark.parametrize("length", [5, 10])
def test_an_epoch_of_whole_blocks_ends_too(length):
    drawn = captions(stream(Source(length)), range(2 * length))
    assert sorted(drawn[:length]) == sorted(drawn[length:]) == sorted(str(i) for i in range(length))


def test_an_unreadable_sample_gives_way_to_another_of_its_block():
    some = stream()
    draw = some.sample_indices([10])[0]  # of the last block, samples 10 and 11
    other = some.substitute(draw)
    assert {draw.index, other.index} == {10, 11}
    assert (other.epoch, other.sample) == (draw.epoch, draw.sample)
    assert some.substitute(other) == draw


def test_a_stream_that_changes_or_is_empty_is_an_error():
    lengths = iter((12, 9))
    changing = Stream(lambda epoch: Source(next(lengths))(epoch), seed=0, buffer=5)
    with pytest.raises(ValueError, match="12 samples in one epoch and 9 in another"):
        captions(changing, range(24))
    with pytest.raises(ValueError, match="no samples"):
        captions(stream(Source(0)), range(1))
    with pytest.raises(ValueError, match="at least 1 sample"):
        stream(buffer=0)
